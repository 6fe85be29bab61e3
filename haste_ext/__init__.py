"""haste_ext: three fused operations for training and sampling diffusion transformers, on CPU and CUDA.

- :func:`attn_align_loss`: attention-map distillation that never writes a map,
- :func:`token_cosine_loss`: the REPA loss, −cosine per token,
- :func:`taylor_extrapolate` and :func:`taylor_extrapolate_blocks`: the forecast of cached features.

The same operations stand under ``torch.ops.haste.*`` once this package is imported; their definitions in plain
torch are in :mod:`haste_ext.reference`.
"""

from __future__ import annotations

from haste_ext._load import build_info
from haste_ext.ops.attn_align_loss import attn_align_loss
from haste_ext.ops.taylor_extrapolate import taylor_extrapolate, taylor_extrapolate_blocks
from haste_ext.ops.token_cosine_loss import token_cosine_loss

__version__ = build_info()["version"]
__all__ = [
    "attn_align_loss",
    "build_info",
    "taylor_extrapolate",
    "taylor_extrapolate_blocks",
    "token_cosine_loss",
]
