"""Every private part of torch that haste uses, so that a new torch is checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lerp_all_(values: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """values ← values + weight·(ends − values), all in one fused pass over the device's memory."""
    torch._foreach_lerp_(values, ends, weight)


def version(tensor: Tensor) -> int | None:
    """It changes when the tensor is written to. None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What F.scaled_dot_product_attention runs on the CPU, as torch.utils.flop_counter sees it."""
