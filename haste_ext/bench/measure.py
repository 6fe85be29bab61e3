"""Time and peak memory of one call on the CPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Seconds:
    median: float
    p20: float
    p80: float


def time_call(call: Callable[[], object], min_seconds: float) -> Seconds:
    """Median, 20th and 80th percentile of the seconds per call, over at least `min_seconds` of calls."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times = torch.tensor(timer.blocked_autorange(min_run_time=min_seconds).times, dtype=torch.float64)
    return Seconds(*(times.quantile(q).item() for q in (0.5, 0.2, 0.8)))


def peak_extra_bytes(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Peak resident memory during one call beyond what was resident before it and beyond its own results.

    Counted by the kernel (the resident high-water mark), so scratch that no tensor knows of is counted too.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this call takes
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is resident now
    results = call()
    peak = _status("VmHWM")
    return max(0, peak - before - sum(x.numel() * x.element_size() for x in results))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")
