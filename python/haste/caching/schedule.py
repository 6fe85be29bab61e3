"""Which steps of a sampler are computed in full, and which are forecast.

A schedule is a rule, frozen; `begin` makes the course of one run out of it, which is asked step by step.

Which evaluation of a run a call of the model is: told by the time that it is called with, held against the plan.

A call that is out of step with its plan would be forecast from the features of other steps, or of another image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

from haste.errors import UserError, shorten
from haste.samplers import ModelCall, time_of
from haste.validation import check_number


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
    a distance d, measured. A forecast from n snapshots errs as d^n, so the next distance is
    d·(error_threshold / e)^(1/n), as the step size of an ODE solver is chosen (Hairer, Nørsett & Wanner, Solving ODEs
    I, II.4), at least 1 and at most max_interval. Distances are those to the newest snapshot, and of Heun's two
    evaluations the second is measured.
    """

    error_threshold: float
    max_interval: int = 10
    first_enhance: int = 2

    def __post_init__(self) -> None:
        if not self.error_threshold > 0:
            raise UserError(f"--error-threshold must be above 0, got {self.error_threshold}")
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
        allowed = distance * (self.schedule.error_threshold / max(error, 1e-12)) ** (1 / orders)
        # A model that gave NaN has an error of NaN, which is within no bound.
        self.interval = int(min(allowed, self.schedule.max_interval)) if allowed >= 1 else 1


def describe_steps(steps: Sequence[int]) -> str:
    """0,1,5,9, as --full-steps takes it."""
    return ",".join(map(str, steps))


Plan = int | Sequence[float] | Sequence[ModelCall]

SEVERAL = "for guidance in two calls, or a solver that calls more than once a step, pass evaluations="
ANEW = "before another run call start()"


class Clock:
    """One run.

    The first time of the run, seen again after others, begins the run anew: the one before was over, or broken off,
    or its plan is too long (`cut_short`).

    Args:
        given: all evaluations that will follow; or the times of so many, one a step; or their number, and then every
            call's own time is taken, which must fall, or rise, from call to call.

    Attributes:
        plan: the evaluations; of a number alone their times are NaN.
        times_known: whether the plan's times are known before the calls.

    Raises:
        UserError: a number of steps that is none, times that neither fall nor rise.
    """

    def __init__(self, given: Plan) -> None:
        self.given = given
        self.times_known = not isinstance(given, Integral)
        if not self.times_known:  # NumPy's integers too
            check_number("num_steps", given, shown="num_steps")
            self.plan = [ModelCall(step, step, math.nan) for step in range(given)]
        elif isinstance(given, Sequence) and all(isinstance(each, ModelCall) for each in given):
            self.plan = list(given)
        else:
            self.plan = [ModelCall(step, step, time) for step, time in enumerate(_times(given))]
        self._done = 0
        self._first = self._last = math.nan  # times of this run so far
        times = sorted({evaluation.time for evaluation in self.plan}) if self.times_known else []
        self._gap = min((after - before for before, after in pairwise(times)), default=math.inf)
        self._scale = max(map(abs, times), default=1.0)

    @property
    def coming(self) -> list[ModelCall]:
        """The evaluations of the plan that are not done."""
        return self.plan[self._done :]

    def evaluation(self, t: Tensor) -> ModelCall | None:
        """The next evaluation, at the time of this call; None if the call begins the run anew.

        A time that does not know its value on the host is asked for it, for which a GPU is waited for.

        Raises UserError for a call that is out of step with the plan.
        """
        time = _time(t)
        if time is not None and self._begins_anew(time, t.dtype):
            return None
        if self._done == len(self.plan):
            raise UserError(
                f"this run had {self._done} evaluations and is over, and the model was called at t = {_shown(time)}; "
                f"{ANEW}; {SEVERAL}"
            )
        planned = self.plan[self._done]
        if not self.times_known:
            return planned if time is None else planned._replace(time=self._in_order(time))
        if time is not None and not self._is(time, planned.time, t.dtype):
            raise UserError(
                f"call {self._done + 1} of this run has t = {time:.6g}, and the plan has {planned.time:.6g} there; "
                f"pass the times that the loop calls with, as times= or in evaluations=, and {ANEW}"
            )
        return planned

    def passed(self, evaluation: ModelCall) -> None:
        """Count an evaluation that was made."""
        self._done += 1
        self._first = evaluation.time if self._done == 1 else self._first
        self._last = evaluation.time

    def cut_short(self) -> str:
        """What to say of a run that ends here, before its plan is over: its forecasts went by the wrong plan, unless it
        was broken off."""
        plan = "evaluations= or times= must list the" if self.times_known else "num_steps must be the number of"
        return f"the last run had {self._done} of its {len(self.plan)} evaluations; {plan} calls of a run"

    def _begins_anew(self, time: float, dtype: torch.dtype) -> bool:
        over = self._done == len(self.plan)
        if not self._done or not (over or self._last != self._first):
            return False
        if not self.times_known:
            return time == self._first
        expected = not over and self._is(time, self.plan[self._done].time, dtype)
        return self._is(time, self._first, dtype) and not expected

    def _is(self, time: float, planned: float, dtype: torch.dtype) -> bool:
        """Equal but for the rounding of a time that was computed in its type; but never as far as the next time."""
        eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
        rounding = eps * self._scale
        return abs(time - planned) <= max(rounding / 2, min(4 * rounding, self._gap / 3))

    def _in_order(self, time: float) -> float:
        """The time, if it goes on from those before."""
        if time == self._last:
            raise UserError(
                f"the model was called twice at t = {time:.6g}, and with a number of steps alone each call is a step; "
                f"{SEVERAL}; {ANEW}"
            )
        if (time - self._last) * (self._last - self._first) < 0:
            raise UserError(
                f"the model was called at t = {time:.6g} after {self._last:.6g}, in a run that began at "
                f"{self._first:.6g}; {ANEW}; {SEVERAL}"
            )
        return time


def _time(t: Tensor) -> float | None:
    """The one time of a call; None of an empty batch."""
    time = time_of(t)
    if time is None and t.numel():
        low, high = torch.stack(t.detach().aminmax()).tolist()
        if low != high and not math.isnan(low):
            raise UserError(f"t must be one time for the whole batch, got {low:.6g} to {high:.6g}")
        time = low
    if time is not None and not math.isfinite(time):
        raise UserError(f"t must be finite, got {time}")
    return time


def _times(given: Sequence[float]) -> list[float]:
    """Times that a caller gives, as numbers."""
    times = given.tolist() if hasattr(given, "tolist") else given
    numbers = isinstance(times, Sequence) and all(isinstance(each, Real) and math.isfinite(each) for each in times)
    if not numbers or isinstance(times, str):
        raise UserError(f"a run must be a number of steps, times or evaluations, got {shorten(repr(given))}")
    steps = [after - before for before, after in pairwise(times)]
    if not (all(step < 0 for step in steps) or all(step > 0 for step in steps)):
        raise UserError(f"times must fall, or rise, from each to the next, got {shorten(repr(given))}; {SEVERAL}")
    return [float(each) for each in times]


def _shown(time: float | None) -> str:
    return "nothing" if time is None else f"{time:.6g}"
