"""The definitions in plain torch, slow and obvious: tests and benchmarks hold the kernels against them.

Give them float64 tensors for the reference values, or the working type for what eager code gets.
"""

from haste_ext.reference.attn_align_loss import attn_align_loss
from haste_ext.reference.taylor_extrapolate import (
    taylor_extrapolate,
    taylor_extrapolate_blocks,
    taylor_extrapolate_steps,
)
from haste_ext.reference.token_cosine_loss import token_cosine_loss

__all__ = [
    "attn_align_loss",
    "taylor_extrapolate",
    "taylor_extrapolate_blocks",
    "taylor_extrapolate_steps",
    "token_cosine_loss",
]
