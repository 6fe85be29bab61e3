"""Time and peak memory of calls on the CPU and on a GPU; the machine that they are measured on, and its roofline."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import haste_ext
from haste_ext import _load

Call = Callable[[], tuple[Tensor, ...]]
HERE = Path(__file__).resolve()

TURNS = 5  # so often every contender is timed, each time for a fifth of the seconds
ENOUGH = 3  # measurements of a call so slow that they already last for all of the seconds

# Of GpuTimer.
GRAPH_SECONDS = 2e-3  # of work in one replay, beside which its start is nothing
CALLS_PER_GRAPH = 512
REPLAYS_PER_SYNC = 5
CALLS_PER_SYNC = 10
WARM_UPS = 3
HOST_CALLS = 20
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2

# Of the roofline.
SECONDS = 0.5
COPY_ELEMENTS = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # float32, far beyond the caches
MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
SLOW = 0.2  # seconds of one product, after which no larger one is tried: some processors have no arithmetic for a type
EXP_ELEMENTS, EXPS_PER_ELEMENT = 64 * 2**20, 512


class CpuTimer:
    """Times one call on the CPU."""

    def __init__(self, call: Call) -> None:
        self.timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())

    def times(self, min_seconds: float) -> list[float]:
        """Seconds per call, each measurement a mean over a block of calls."""
        return self.timer.blocked_autorange(min_run_time=min_seconds).times


class GpuTimer:
    """Times calls that differ in their inputs alone; together the inputs should exceed the L2 several times.

    CUDA graphs over rotated inputs are replayed, so that the host is not timed; what it takes to launch a call is a
    number of its own.

    All of them, in rounds, are captured in one CUDA graph. A call that cannot be captured is timed by events around it,
    and `why_events` says why.

    Args:
        calls: functions without arguments that launch the same work.
        pool: of torch.cuda.graph_pool_handle(). Timers that share one share memory: none may rely on its results.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], pool: object = None) -> None:
        self.calls = list(calls)
        self.why_events: str | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls_per_replay = 0
        before = torch.cuda.current_stream()
        try:
            self._capture(pool)
        except Exception as error:  # a wait for the GPU, memory that runs out, an optimizer that refuses
            self.why_events = _first_words(error)
            torch.cuda.set_stream(before)  # a capture that fails leaves its own in force
            torch.cuda.synchronize()

    def _capture(self, pool: object) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # on it the capture finds every handle and workspace made
            seconds = min(elapsed(call) for call in islice(cycle(self.calls), WARM_UPS))
        rounds = ceil(GRAPH_SECONDS / max(seconds, 1e-7) / len(self.calls))
        rounds = max(1, min(rounds, CALLS_PER_GRAPH // len(self.calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for call in self.calls * rounds:
                call()
        graph.replay()
        torch.cuda.synchronize()
        self.graph, self.calls_per_replay = graph, rounds * len(self.calls)

    def times(self, min_seconds: float) -> list[float]:
        """Seconds per call: a mean over one replay each, or of single calls where there is no graph."""
        if self.graph is None:
            return self._times_by_events(min_seconds)
        replays: list[float] = []
        while sum(replays) < min_seconds:
            events = [around(self.graph.replay) for _ in range(REPLAYS_PER_SYNC)]
            torch.cuda.synchronize()
            replays += [start.elapsed_time(end) / 1e3 for start, end in events]
        return [seconds / self.calls_per_replay for seconds in replays]

    def _times_by_events(self, min_seconds: float) -> list[float]:
        """Before each call the L2 is overwritten, which also keeps the GPU busy while the host prepares the call."""
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        rotation: Iterator = cycle(self.calls)
        times: list[float] = []
        while sum(times) < min_seconds or len(times) < CALLS_PER_SYNC:
            events = []
            for call in islice(rotation, CALLS_PER_SYNC):
                flush.zero_()
                events.append(around(call))
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) / 1e3 for start, end in events]
        return times

    def host_times(self) -> list[float]:
        """Seconds that the host takes for one call, launched one by one with nothing queued before it."""
        times = []
        for call in islice(cycle(self.calls), HOST_CALLS):
            torch.cuda.synchronize()
            begin = perf_counter()
            call()
            times.append(perf_counter() - begin)
        torch.cuda.synchronize()
        return times


def around(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after the work that a call launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def elapsed(call: Callable[[], object]) -> float:
    """Seconds of one call, the wait for it included."""
    start, end = around(call)
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _first_words(error: BaseException) -> str:
    """Of what ended the capture; torch's own word on leaving it hides that."""
    while error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


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

    On the CPU it is Linux's count (the resident high-water mark), so scratch memory outside of tensors is counted too;
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

    A GPU's allocator raises by itself, and its driver reserves addresses that would be counted here.
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


# ---- the machine: commit, versions, processor; and what nothing that moves and multiplies can beat by much ----


def describe_machine(device: str) -> dict[str, object]:
    build = haste_ext.build_info()
    return {
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "haste_ext": build["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": build["cpu_capability"],
        "gpu": gpu() if device == "cuda" else None,
        "build": build,
    }


def commit() -> dict[str, object]:
    """Of the source tree that this file is tracked in; unknown for an installed package."""
    if git("ls-files", "--error-unmatch", HERE.name) is None:
        return {"commit": None, "modified": None}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, object]:
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def measure_roofline(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, object]:
    """The best of some repetitions each: copy bandwidth (bytes read + written), matmul rate by type, exponentials."""
    dtypes = dict.fromkeys((torch.float32, *dtypes))
    return {
        "copy_bytes_per_second": copy_rate(device),
        "matmul_flops_per_second": {str(dtype).removeprefix("torch."): matmul_rate(device, dtype) for dtype in dtypes},
        "exps_per_second": exp_rate() if device == "cuda" else None,  # on the CPU they are ordinary arithmetic
    }


def copy_rate(device: str) -> float:
    source = torch.ones(COPY_ELEMENTS[device], device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(times_of([lambda: target.copy_(source)], SECONDS, device))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Of square products, the best size."""
    best = 0.0
    for n in MATMUL_SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds = min(times_of([product], SECONDS / 4, device))
        best = max(best, 2 * n**3 / seconds)
        if seconds > SLOW:
            break
    return best


def exp_rate() -> float | None:
    """exp2 of values in registers, many per element; None where torch cannot compile the kernel."""
    code = f"""
    template <typename T> T exp2_chain(T x) {{
      for (int i = 0; i < {EXPS_PER_ELEMENT}; ++i) x = exp2f(-x);
      return x;
    }}"""
    x = torch.zeros(EXP_ELEMENTS, device="cuda")
    try:
        chain = _load.create_cuda_function(code)
        chain(x)
    except RuntimeError:
        return None
    return EXP_ELEMENTS * EXPS_PER_ELEMENT / min(times_of([lambda: chain(x)], SECONDS, "cuda"))
