"""What the sweeps of a checkpoint and of a pipeline share: points that are measured once, and timed in turns.

What was measured of a point is on the disk before the next one begins, so that a killed sweep resumes where it stopped.
"""

from __future__ import annotations

import gc
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from haste.generation.config import SamplingConfig
from haste.sweep.config import long_name, point_fields
from haste.sweep.records import Record, SweepDir

Progress = Callable[[str, int], None]
"""progress(name of a point, number of its images that are done since the last call)"""


class Turns(ABC):
    """Measures points that the model and the number of steps allow, and times them in turns.

    Attributes:
        points: the first is the reference, the longest uncached run.
        folder: what is known.
        repeats: how often each point is timed.
        skipped: why points were left out.
    """

    points: list[SamplingConfig]
    folder: SweepDir
    repeats: int
    skipped: list[str]

    @property
    @abstractmethod
    def shared(self) -> Record:
        """What the records of this sweep have in common; "batch" is the images of a timing."""

    @abstractmethod
    def _measure(self, settings: SamplingConfig, progress: Progress) -> bool:
        """Measure cost and quality of one point; False if it is impossible, which of an uncached point is an error."""

    @abstractmethod
    def _seconds(self, settings: SamplingConfig) -> float:
        """Seconds per image of one run, after a warm-up."""

    def run(self, progress: Progress = lambda name, count: None) -> None:
        """Measure what is not known yet."""
        possible = [settings for settings in self.points if self._measure(settings, progress)]
        for turn in range(self.repeats):
            self._time(possible, turn, progress)

    def _known(self, settings: SamplingConfig) -> Record:
        return self.folder.find(self.shared, point_fields(settings))

    def _add(self, settings: SamplingConfig, **measured: Any) -> None:
        self.folder.add(self.shared, point_fields(settings), **measured)

    def _time(self, points: list[SamplingConfig], turn: int, progress: Progress) -> None:
        """Time every point that lacks this turn, in an order of its own, the reference first.

        The speed of a machine drifts, so ratios to the reference are taken within a turn. A turn that was interrupted
        resumes with another run of the reference.
        """
        batch = self.shared["batch"]
        lacking = [settings for settings in points if len(self._known(settings).get("seconds", [])) <= turn]
        for settings in points:
            if settings not in lacking:
                progress(long_name(settings), batch)
        if not lacking:
            return
        reference = self._seconds(points[0])
        for settings in random.Random(turn).sample(lacking, len(lacking)):
            own = reference if settings is points[0] else self._seconds(settings)
            known = self._known(settings)
            self._add(
                settings,
                seconds=[*known.get("seconds", []), own],
                reference_seconds=[*known.get("reference_seconds", []), reference],
            )
            progress(long_name(settings), batch)


@contextmanager
def stopwatch(on_gpu: bool) -> Iterator[Callable[[], float]]:
    """Seconds since the beginning, once all work on the GPU is done; without garbage collection, which takes as long as
    many steps and would hit some runs and not others."""

    def elapsed() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return perf_counter() - begin

    if on_gpu:
        torch.cuda.synchronize()
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = perf_counter()
        yield elapsed
    finally:
        if collecting:
            gc.enable()
