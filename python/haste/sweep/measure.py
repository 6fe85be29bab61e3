"""The sweep: every point is drawn and judged, then all take turns at being timed.

What is known of a point is on the disk before the next one begins, so a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from haste.caching import check_memory
from haste.errors import UserError
from haste.generation.drawing import Sampler
from haste.generation.filling import measure_full_steps
from haste.generation.settings import SamplingSettings
from haste.generation.student import Student
from haste.sweep.cost import count_cost, time_run
from haste.sweep.points import long_name, point_fields, shared_fields
from haste.sweep.quality import Quality, agreement
from haste.sweep.records import RecordBook
from haste.training.identity import as_before, checkpoint_identity
from haste_ext.bench.machine import describe_machine

TWINS = 256  # pictures that are held beside the reference's

Progress = Callable[[str, int], None]


@dataclass
class Sweep:
    """Measures `points` of one student, the first of which is the reference: the longest run with every step in full.

    samples: pictures to draw of each point. batch: how many at once. repeats: how often each point is timed.

    cuda_graphs: on a GPU cached runs replay CUDA graphs, as with haste sample --cuda-graphs; plain runs never do.

    A cached point that the model or the number of steps does not allow is passed over; `skipped` says why.
    """

    student: Student
    points: list[SamplingSettings]
    quality: Quality
    book: RecordBook
    samples: int
    batch: int
    repeats: int
    cuda_graphs: bool = False
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What the records of this sweep have in common."""
        device = str(next(self.student.model.parameters()).device.type)
        machine = describe_machine(device)
        return {
            **checkpoint_identity(self.student.checkpoint),
            "student": self.student.label,
            **({"convention": "sit"} if self.student.rounded else {}),  # how it is guided and rounded
            "settings": shared_fields(self.points[0]),
            "samples": self.samples,
            "batch": min(self.batch, self.samples),
            "cuda_graphs": self.cuda_graphs,
            "judged_by": self.quality.key,
            "machine": {name: machine[name] for name in ("device", "processor", "threads", "gpu", "torch")},
        }

    @property
    def pictures(self) -> int:
        """How many pictures `run` draws in all, if no point is passed over and none is known."""
        return len(self.points) * (self.samples + self.repeats * self.shared["batch"])

    def run(self, progress: Progress = lambda name, pictures: None) -> None:
        """Measures what is not known yet. `progress` hears a point's name and how many of its pictures are done."""
        self.book.rename(as_before(self.shared, self.student.checkpoint), self.shared)
        possible = [settings for settings in self.points if self._judge(settings, progress)]
        for turn in range(self.repeats):
            self._time(possible, turn, progress)

    @cached_property
    def _reference(self) -> Sampler:
        return Sampler(self.student, self.points[0])

    def _sampler(self, settings: SamplingSettings) -> Sampler:
        """One with a cache of its own, so that a cache's memory is held for one point at a time."""
        sampler = self._reference.with_settings(settings)
        if settings.max_error:  # as haste sample: the same full steps for all pictures, measured once
            steps = self._known(settings).get("full_steps")
            steps = steps or measure_full_steps(sampler)
            sampler = sampler.with_full_steps(steps)
        if self.cuda_graphs and settings.cache != "none":
            sampler.speed_up(compile=False, cuda_graphs=True)
        return sampler

    def _judge(self, settings: SamplingSettings, progress: Progress) -> bool:
        """Draws one point's pictures, and whether that is possible. A full run's errors are the command's."""
        if "distance" in self._known(settings):
            progress(long_name(settings), self.samples)
            return True
        try:
            sampler = self._sampler(settings)
            check_memory(self.student.model, settings, self.shared["batch"], guided=settings.cfg_scale > 1)
            cost = count_cost(sampler, self.shared["batch"])
        except UserError as error:
            if settings.cache == "none":
                raise
            self.skipped.append(f"{long_name(settings)}: {error}")
            progress(long_name(settings), self.samples + self.repeats * self.shared["batch"])
            return False
        self.book.keep(self.shared, point_fields(settings), **cost, **self._draw(settings, sampler, progress))
        return True

    def _known(self, settings: SamplingSettings) -> dict[str, Any]:
        return self.book.find(self.shared, point_fields(settings))

    def _draw(self, settings: SamplingSettings, sampler: Sampler, progress: Progress) -> dict[str, Any]:
        """The quality of one point's pictures."""
        parts, labels, first = [], [], []
        for start in range(0, self.samples, self.batch):
            indices = range(start, min(start + self.batch, self.samples))
            images, asked = sampler.draw(indices)
            parts.append(self.quality.features(images))
            labels.append(asked)
            first.append(images[: max(TWINS - start, 0)])
            progress(long_name(settings), len(indices))
        scores = self.quality.score(parts, np.concatenate(labels))
        return {**scores, **self._agreement(settings, np.concatenate(first))}

    def _agreement(self, settings: SamplingSettings, images: np.ndarray) -> dict[str, Any]:
        """With the reference's pictures. In the SDE another number of steps is other noise, and nothing agrees."""
        reference = self.points[0]
        if settings is reference or (settings.mode == "sde" and settings.num_steps != reference.num_steps):
            return {"psnr": None, "ssim": None}
        return agreement(images, self._twins)

    @cached_property
    def _twins(self) -> np.ndarray:
        """The reference's first pictures, drawn again: they are what agreement is with."""
        count = min(TWINS, self.samples)
        batches = (range(start, min(start + self.batch, count)) for start in range(0, count, self.batch))
        return np.concatenate([self._reference.draw(indices)[0] for indices in batches])

    def _time(self, points: list[SamplingSettings], turn: int, progress: Progress) -> None:
        """One turn of every point that lacks it, in an order of its own, the reference first.

        A machine drifts, so the ratio to the reference is taken within a turn; one that was cut short by a kill goes on
        with a reference of its own.
        """
        lacking = [settings for settings in points if len(self._seconds(settings)) <= turn]
        for settings in points:
            if settings not in lacking:
                progress(long_name(settings), self.shared["batch"])
        if not lacking:
            return
        reference = self._seconds_of_a_run(points[0])
        for settings in random.Random(turn).sample(lacking, len(lacking)):
            own = reference if settings is points[0] else self._seconds_of_a_run(settings)
            known = self._known(settings)
            self.book.keep(
                self.shared,
                point_fields(settings),
                seconds=[*known.get("seconds", []), own],
                reference_seconds=[*known.get("reference_seconds", []), reference],
            )
            progress(long_name(settings), self.shared["batch"])

    def _seconds(self, settings: SamplingSettings) -> list[float]:
        return self._known(settings).get("seconds", [])

    def _seconds_of_a_run(self, settings: SamplingSettings) -> float:
        return time_run(self._sampler(settings), self.shared["batch"])
