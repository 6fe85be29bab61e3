"""Time and peak memory of calls, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from haste_ext.bench.gpu_timer import GpuTimer
from haste_ext.bench.operation import Call

TURNS = 5  # so often every contender is timed, each time for a fifth of the seconds
ENOUGH = 3  # measurements of a call so slow that they already last for all of the seconds


class CpuTimer:
    """Times one call on the CPU."""

    def __init__(self, call: Call) -> None:
        self.timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())

    def times(self, min_seconds: float) -> list[float]:
        """Seconds per call, each measurement a mean over a block of calls."""
        return self.timer.blocked_autorange(min_run_time=min_seconds).times


def make_timers(contenders: Mapping[str, Sequence[Call]], device: str) -> dict[str, CpuTimer | GpuTimer]:
    """One per contender, which is one call, or on a GPU several that differ in their inputs."""
    if device != "cuda":
        return {name: CpuTimer(calls[0]) for name, calls in contenders.items()}
    pool = torch.cuda.graph_pool_handle()  # else every contender's graph would hold its memory beside the others'
    return {name: GpuTimer(calls, pool) for name, calls in contenders.items()}


def times_in_turns(timers: Mapping[str, CpuTimer | GpuTimer], min_seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each contender, over at least `min_seconds` of calls.

    A machine drifts: its clock, its neighbours, the pages that eager code faults in. So the contenders take turns, each
    turn beginning with the next one, and what drifts hits all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for turn in range(TURNS):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if len(times[name]) >= ENOUGH and sum(times[name]) >= min_seconds:
                continue
            times[name] += timers[name].times(min_seconds / TURNS)
    return times


def times_of(calls: Sequence[Call], min_seconds: float, device: str) -> list[float]:
    return make_timers({"": calls}, device)[""].times(min_seconds)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many measurements they are of."""
    values = torch.tensor(times, dtype=torch.float64)
    quantiles = {name: values.quantile(q).item() for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
    return {**quantiles, "measurements": len(times)}


def peak_extra_bytes(call: Call, device: str, calls: int = 3) -> int | None:
    """Peak memory during one call beyond what was held before it and beyond its own results; None if unknown.

    On the CPU it is Linux's count (the resident high-water mark), so scratch that no tensor knows of is counted too;
    elsewhere there is no such count. On a GPU it is the caching allocator's, and the operations allocate nowhere else.
    The highest of so many calls, as Linux's mark has been seen to lag behind on a busy machine.
    """
    if device == "cuda":
        peak = _peak_on_gpu
    elif Path("/proc/self/clear_refs").exists():
        peak = _peak_on_linux
    else:
        return None
    gc.collect()
    return max(0, *(peak(call) for _ in range(calls)))


def _peak_on_gpu(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - _bytes(results) - before


def _peak_on_linux(call: Call) -> int:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # what earlier calls freed must not hide what this call takes
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is resident now
    results = call()
    return _status("VmHWM") - _bytes(results) - before


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _status(field: str) -> int:
    return _kibibytes("/proc/self/status", field) * 1024


def _kibibytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {field}")


@contextmanager
def memory_within_the_machine(device: str) -> Iterator[None]:
    """Here a contender that wants more memory than the machine has free gets an error, not the process killed.

    A GPU's allocator says so by itself, and its driver reserves addresses that would be counted here.
    """
    if device == "cuda" or not Path("/proc/meminfo").exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    available = _status("VmData") + 1024 * _kibibytes("/proc/meminfo", "MemAvailable")
    limits = [limit for limit in (available, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
