"""Times that a sampler makes, which know their value on the host: to ask a tensor on a GPU for it is to wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def times_at(time: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,), each of them `time`, which `time_of` gives back."""
    times = torch.full((count,), time, dtype=dtype, device=device)
    times._time_on_host = (time, version(times))
    return times


def time_of(times: Tensor) -> float | None:
    """The time that `times_at` was given; None for a tensor made otherwise, or written to since."""
    time, made = getattr(times, "_time_on_host", (None, None))
    return time if version(times) == made else None


def version(tensor: Tensor) -> int | None:
    """It changes when the tensor is written to. None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version
