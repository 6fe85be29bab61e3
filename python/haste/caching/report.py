"""What a cache did in a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from haste.caching.schedule import describe_steps


@dataclass
class CacheReport:
    """What a cache did in its last run, and what it holds.

    Attributes:
        full_steps, forecast_steps: their numbers, from 0, of the run.
        full_calls, forecast_calls: model calls; guidance and some solvers call more than once a step.
        seconds_full, seconds_forecast: of these calls.
        mib: MiB of cached features.
        cached: what is cached, in words.
        parts: the reports of a pipeline's models by their names; empty for a single model.
    """

    full_steps: list[int] = field(default_factory=list)
    forecast_steps: list[int] = field(default_factory=list)
    full_calls: int = 0
    forecast_calls: int = 0
    seconds_full: float = 0.0
    seconds_forecast: float = 0.0
    mib: float = 0.0
    cached: str = ""
    parts: dict[str, CacheReport] = field(default_factory=dict)

    @classmethod
    def of_parts(cls, parts: dict[str, CacheReport]) -> CacheReport:
        """The sum of the reports of several models of a pipeline."""
        each = list(parts.values())
        full = sorted({step for report in each for step in report.full_steps})
        return cls(
            full,
            sorted({step for report in each for step in report.forecast_steps} - set(full)),
            sum(report.full_calls for report in each),
            sum(report.forecast_calls for report in each),
            sum(report.seconds_full for report in each),
            sum(report.seconds_forecast for report in each),
            sum(report.mib for report in each),
            "; ".join(dict.fromkeys(report.cached for report in each if report.cached)),
            parts,
        )

    def __str__(self) -> str:
        steps = len(self.full_steps) + len(self.forecast_steps)
        if not steps:
            return "no step has been cached yet"
        if len(self.parts) > 1:
            return "\n".join(f"{name}: {report}" for name, report in self.parts.items())
        lines = [
            f"{len(self.full_steps)} of {steps} steps in full: {describe_steps(self.full_steps)}",
            f"{self.full_calls} full calls in {self.seconds_full:.2f} s, {self.forecast_calls} forecast calls in "
            f"{self.seconds_forecast:.2f} s",
            f"{self.mib:.2f} MiB: {self.cached}",
        ]
        return "\n".join(lines)


class Stopwatch:
    """Seconds of blocks of code; on a GPU those of its stream, which is waited for only when they are read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the time of this block."""
        if device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        self._events.append((begun, ended))

    def __deepcopy__(self, memo: dict[int, Any]) -> Stopwatch:
        """A copy of the seconds so far: events cannot be copied."""
        copied = Stopwatch()
        copied._seconds = self.read()
        return copied

    def read(self) -> float:
        """The seconds so far."""
        for begun, ended in self._events:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._events.clear()
        return self._seconds


def mib(sizes: Sequence[int]) -> float:
    """Bytes, summed, in MiB."""
    return sum(sizes) / 2**20
