"""Every private part of torch that haste uses, so that a new torch is checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def lerp_all_(values: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """values ← values + weight·(ends − values), all in one fused pass over the device's memory."""
    torch._foreach_lerp_(values, ends, weight)


def version(tensor: Tensor) -> int | None:
    """It changes when the tensor is written to. None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def flop_counter() -> FlopCounterMode:
    """torch's counter, and in its list the attention that torch runs on the CPU, which it lacks."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: attention})
