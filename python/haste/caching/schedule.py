"""Which steps of a sampler are computed in full, and which are forecast.

A schedule is a rule, frozen; `begin` makes the course of one run out of it, which is asked step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from haste.errors import UserError


class Course(Protocol):
    """Of one run. wants_error: `report` is told how wrong a forecast of every full step would have been."""

    wants_error: bool

    def is_full(self, step: int, last_full: int | None) -> bool:
        """Whether `step` is full, when `last_full` was the last full one; None: nothing to forecast from."""

    def report(self, error: float, distance: int, orders: int) -> None:
        """The relative error of a forecast over `distance` steps from `orders` snapshots."""


class Schedule(Protocol):
    def begin(self, num_steps: int) -> Course:
        """UserError for a rule that makes no sense for so many steps."""

    def full_steps(self, num_steps: int) -> list[int] | None:
        """The full steps of an undisturbed run; None if they depend on what is measured."""


@dataclass(frozen=True)
class IntervalSchedule:
    """TaylorSeer's schedule (arXiv 2503.06923): the first steps full, from there on one full step every `interval`.

    The interval is counted from the last full step: with first_enhance 2 and interval 4 the full steps are
    0, 1, 5, 9, ... Of 50 steps intervals 3, 4, 5 and 6 leave 18, 14, 11 and 10 full ones, as published.
    """

    interval: int
    first_enhance: int = 2
    wants_error = False

    def __post_init__(self) -> None:
        for flag, value in (("--interval", self.interval), ("--first-enhance", self.first_enhance)):
            if value < 1:
                raise UserError(f"{flag} must be at least 1, got {value}")

    def begin(self, num_steps: int) -> IntervalSchedule:
        for flag, value in (("--interval", self.interval), ("--first-enhance", self.first_enhance)):
            if value > num_steps:
                raise UserError(f"{flag} must not be above the number of steps, {num_steps}, got {value}")
        return self

    def is_full(self, step: int, last_full: int | None) -> bool:
        return last_full is None or step < self.first_enhance or step - last_full >= self.interval

    def full_steps(self, num_steps: int) -> list[int]:
        full: list[int] = []
        for step in range(num_steps):
            if self.begin(num_steps).is_full(step, full[-1] if full else None):
                full.append(step)
        return full


@dataclass(frozen=True)
class ListedSchedule:
    """The full steps by their numbers, from 0; the first step is always full."""

    steps: tuple[int, ...]
    wants_error = False

    def __post_init__(self) -> None:
        if not self.steps or sorted(set(self.steps)) != list(self.steps) or self.steps[0] != 0:
            shown = ",".join(map(str, self.steps)) or "''"
            raise UserError(f"--full-steps must be increasing step numbers that begin with 0, got {shown}")

    def begin(self, num_steps: int) -> ListedSchedule:
        if self.steps[-1] >= num_steps:
            raise UserError(f"--full-steps must be numbers from 0 to {num_steps - 1} for {num_steps} steps, "
                            f"got {self.steps[-1]}")  # fmt: skip
        return self

    def is_full(self, step: int, last_full: int | None) -> bool:
        return last_full is None or step in self.steps

    def full_steps(self, num_steps: int) -> list[int]:
        return list(self.begin(num_steps).steps)


@dataclass(frozen=True)
class AdaptiveSchedule:
    """As far from one full step to the next as a bound on the forecast's error allows.

    At every full step the forecast that would have stood in for it is computed as well, and its relative error e, over
    a distance d, measured. A forecast from n snapshots errs as d^n, so the next distance is d·(max_error / e)^(1/n), as
    the step size of an ODE solver is chosen (Hairer, Nørsett & Wanner, Solving ODEs I, II.4), at least 1 and at most
    max_interval. Distances are those to the newest snapshot, and of Heun's two evaluations the second is measured.
    """

    max_error: float
    max_interval: int = 10
    first_enhance: int = 2

    def __post_init__(self) -> None:
        if not self.max_error > 0:
            raise UserError(f"--max-error must be above 0, got {self.max_error}")
        IntervalSchedule(self.max_interval, self.first_enhance)

    def begin(self, num_steps: int) -> AdaptiveCourse:
        IntervalSchedule(1, self.first_enhance).begin(num_steps)
        return AdaptiveCourse(self)

    def full_steps(self, num_steps: int) -> None:
        return None


class AdaptiveCourse:
    """One run of an adaptive schedule."""

    wants_error = True

    def __init__(self, schedule: AdaptiveSchedule) -> None:
        self.schedule = schedule
        self.interval = 1  # until something is measured

    def is_full(self, step: int, last_full: int | None) -> bool:
        return last_full is None or step < self.schedule.first_enhance or step - last_full >= self.interval

    def report(self, error: float, distance: int, orders: int) -> None:
        allowed = distance * (self.schedule.max_error / max(error, 1e-12)) ** (1 / orders)
        # A model that gave NaN has an error of NaN, which is within no bound.
        self.interval = int(min(allowed, self.schedule.max_interval)) if allowed >= 1 else 1


def describe_steps(steps: Sequence[int]) -> str:
    """0,1,5,9, as --full-steps takes it."""
    return ",".join(map(str, steps))
