"""haste_ext: fused operations for training and sampling diffusion transformers, on CPU and CUDA.

- :func:`attn_align_loss`: attention-map distillation that never writes a map,
- :func:`token_cosine_loss`: the REPA loss, −cosine per token,
- :func:`taylor_extrapolate`, :func:`taylor_extrapolate_blocks` and :func:`taylor_extrapolate_steps`: the forecast of
  cached features, of one module, of all modules, and of all modules at all steps until the next full one.

The same operations stand under ``torch.ops.haste.*`` once this package is imported; their definitions in plain
torch are in :mod:`haste_ext.reference`.
"""

from __future__ import annotations

from haste_ext._load import build_info
from haste_ext.ops.attn_align_loss import attn_align_loss
from haste_ext.ops.taylor_extrapolate import taylor_extrapolate, taylor_extrapolate_blocks, taylor_extrapolate_steps
from haste_ext.ops.token_cosine_loss import token_cosine_loss

__version__ = build_info()["version"]
__all__ = [
    "attn_align_loss",
    "build_info",
    "taylor_extrapolate",
    "taylor_extrapolate_blocks",
    "taylor_extrapolate_steps",
    "token_cosine_loss",
]
