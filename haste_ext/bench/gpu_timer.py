"""Time of calls on a GPU: CUDA graphs over rotated inputs are replayed, so that the host is not timed.

What the host takes to launch a call is a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from math import ceil
from time import perf_counter

import torch

GRAPH_SECONDS = 2e-3  # of work in one replay, beside which its start is nothing
CALLS_PER_GRAPH = 512
REPLAYS_PER_SYNC = 5
CALLS_PER_SYNC = 10
WARM_UPS = 3
HOST_CALLS = 20
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


class GpuTimer:
    """Times calls that differ in their inputs alone; together the inputs should exceed the L2 several times.

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
