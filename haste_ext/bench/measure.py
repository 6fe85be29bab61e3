"""Time and peak memory of one call, on the CPU and on a GPU."""

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


def time_call(call: Callable[[], object], min_seconds: float, device: str) -> Seconds:
    """Median, 20th and 80th percentile of the seconds per call, over at least `min_seconds` of calls."""
    times = _times_on_gpu(call, min_seconds) if device == "cuda" else _times_on_cpu(call, min_seconds)
    times = torch.tensor(times, dtype=torch.float64)
    return Seconds(*(times.quantile(q).item() for q in (0.5, 0.2, 0.8)))


def _times_on_cpu(call: Callable[[], object], min_seconds: float) -> list[float]:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_seconds).times


def _times_on_gpu(call: Callable[[], object], min_seconds: float) -> list[float]:
    """By events around each call, the L2 cache overwritten before it."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: list[float] = []
    while sum(times) < min_seconds or len(times) < 10:
        batch = []
        for _ in range(10):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            batch.append((start, end))
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) / 1e3 for start, end in batch]
    return times


def peak_extra_bytes(call: Callable[[], tuple[torch.Tensor, ...]], device: str) -> int:
    """Peak memory during one call beyond what was held before it and beyond its own results.

    On the CPU it is the kernel's count (the resident high-water mark), so scratch that no tensor knows of is counted
    too; on a GPU it is the caching allocator's, and the operations allocate nowhere else.
    """
    gc.collect()
    before, peak = _peak_on_gpu(call) if device == "cuda" else _peak_on_cpu(call)
    return max(0, peak - before)


def _peak_on_gpu(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    return before, torch.cuda.max_memory_allocated() - _bytes(results)


def _peak_on_cpu(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[int, int]:
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this call takes
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is resident now
    results = call()
    return before, _status("VmHWM") - _bytes(results)


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")
