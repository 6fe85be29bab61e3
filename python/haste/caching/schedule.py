"""Which steps of a run are computed in full, and the place of each model call in the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from haste.caching.config import CacheConfig
from haste.errors import UserError, shorten
from haste.samplers import ModelCall, time_of
from haste.validation import check_number


class ScheduleState:
    """Decides step by step which steps of one run are full, by one of three rules.

    - The steps of a list, or at even distances (`haste.caching.config.even_steps`).
    - TaylorSeer's (arXiv 2503.06923): the first steps, then one full step every `interval`, counted from the last full
      one: with first_enhance 2 and interval 4 the full steps are 0, 1, 5, 9, ...
    - As far from one full step to the next as a bound on the forecast's error allows. At every full step the forecast
      that would have stood in for it is computed as well, and its relative error e, over a distance d, measured. A
      forecast from n cached features errs as d^n, so the next distance is d·(error_threshold / e)^(1/n), as the step
      size of an ODE solver is chosen (Hairer, Nørsett & Wanner, Solving ODEs I, II.4), at least 1 and at most the
      config's interval. Distances are those to the newest features, and of Heun's two calls the second is measured.

    Attributes:
        interval: steps from one full step to the next, at present.
        wants_error: `report` must be called with the error that a forecast of every full step would have had.

    Raises:
        UserError: a config that is out of bounds for this number of steps.
    """

    def __init__(self, config: CacheConfig, num_steps: int) -> None:
        config.check_run(num_steps)
        self.listed = config.planned_full_steps(num_steps) if config.spacing == "even" else config.full_step_list
        self.first_enhance = config.resolved_first_enhance
        self.error_threshold = config.error_threshold
        self.max_interval = config.resolved_interval
        self.wants_error = bool(config.error_threshold)
        self.interval = 1 if self.wants_error else self.max_interval  # 1 until something is measured

    def is_full(self, step: int, last_full: int | None) -> bool:
        """Whether `step` is full. last_full: the last full step; None if there is nothing to forecast from."""
        if last_full is None:
            return True
        if self.listed:
            return step in self.listed
        return step < self.first_enhance or step - last_full >= self.interval

    def report(self, error: float, distance: float, count: int) -> None:
        """Set the interval by the relative error of a forecast over `distance` steps from `count` cached features."""
        allowed = distance * (self.error_threshold / max(error, 1e-12)) ** (1 / count)
        # NaN, the error of a model that returned NaN, is not >= 1.
        self.interval = int(min(allowed, self.max_interval)) if allowed >= 1 else 1


def describe_steps(steps: Sequence[int]) -> str:
    """0,1,5,9, as --full-steps takes it."""
    return ",".join(map(str, steps))


Plan = int | Sequence[float] | Sequence[ModelCall]
"""The plan of a run: its number of steps or their times, with one model call per step; or all model calls."""

SEVERAL = "for guidance in two calls, or a solver that calls more than once a step, pass model_calls="
ANEW = "before another run call start()"


class Clock:
    """Identifies each model call of a run by its time, and compares it with the plan.

    A call that is not the next of the plan would be forecast from features of other steps, or of another image. The
    first time of the run, seen again after others, begins a new run: the previous one was over, or broken off, or its
    plan is too long (`cut_short`).

    Args:
        given: all calls that will follow; or their times, one per step; or their number: then the time of each call is
            taken from the call, and must fall, or rise, from call to call.

    Attributes:
        plan: the calls; their times are NaN if only their number is given.
        times_known: whether the plan has the times of the calls.

    Raises:
        UserError: a number of steps out of bounds, or times that neither fall nor rise.
    """

    def __init__(self, given: Plan) -> None:
        self.given = given
        self.times_known = not isinstance(given, Integral)  # NumPy's integers too
        if isinstance(given, (int, Integral)):
            check_number("num_steps", given, shown="num_steps")
            self.plan = [ModelCall(step, step, math.nan) for step in range(int(given))]
        elif isinstance(given, Sequence) and all(isinstance(each, ModelCall) for each in given):
            self.plan = list(cast(Sequence[ModelCall], given))
        else:
            self.plan = [ModelCall(step, step, time) for step, time in enumerate(_times(given))]
        self._done = 0
        self._first = self._last = math.nan  # times of this run so far
        times = sorted({call.time for call in self.plan}) if self.times_known else []
        self._gap = min((after - before for before, after in pairwise(times)), default=math.inf)
        self._scale = max(map(abs, times), default=1.0)

    @property
    def coming(self) -> list[ModelCall]:
        """The calls of the plan that have not been made yet."""
        return self.plan[self._done :]

    def next_call(self, t: Tensor) -> ModelCall | None:
        """The next call, at time t; None if this call begins a new run.

        Where t is on a GPU and its value is not known on the host (see `time_of`), reading it waits for the GPU.

        Raises:
            UserError: a call that is not the next of the plan.
        """
        time = _time(t)
        if time is not None and self._begins_anew(time, t.dtype):
            return None
        if self._done == len(self.plan):
            shown = "nothing" if time is None else f"{time:.6g}"
            raise UserError(f"this run had {self._done} calls of the model and is over, and the model was called at "
                            f"t = {shown}; {ANEW}; {SEVERAL}")  # fmt: skip
        planned = self.plan[self._done]
        if not self.times_known:
            return planned if time is None else planned._replace(time=self._in_order(time))
        if time is not None and not self._is(time, planned.time, t.dtype):
            raise UserError(
                f"call {self._done + 1} of this run has t = {time:.6g}, and the plan has {planned.time:.6g} there; "
                f"pass the times that the loop calls with, as times= or in model_calls=, and {ANEW}"
            )
        return planned

    def count(self, call: ModelCall) -> None:
        """Count a call that was made."""
        self._done += 1
        self._first = call.time if self._done == 1 else self._first
        self._last = call.time

    def cut_short(self) -> str:
        """The warning for a run that ends before its plan, whose forecasts were then wrong unless it was broken off."""
        plan = "model_calls= or times= must list the" if self.times_known else "num_steps must be the number of"
        return f"the last run had {self._done} of its {len(self.plan)} calls; {plan} calls of a run"

    def _begins_anew(self, time: float, dtype: torch.dtype) -> bool:
        over = self._done == len(self.plan)
        if not self._done or not (over or self._last != self._first):
            return False
        if not self.times_known:
            return time == self._first
        expected = not over and self._is(time, self.plan[self._done].time, dtype)
        return self._is(time, self._first, dtype) and not expected

    def _is(self, time: float, planned: float, dtype: torch.dtype) -> bool:
        """Equal up to the rounding of a time computed in `dtype`, but never as far off as the next time."""
        eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
        rounding = eps * self._scale
        return abs(time - planned) <= max(rounding / 2, min(4 * rounding, self._gap / 3))

    def _in_order(self, time: float) -> float:
        """The time, if it continues the order of those before."""
        if time == self._last:
            raise UserError(f"the model was called twice at t = {time:.6g}, and with a number of steps alone each call "
                            f"is a step; {SEVERAL}; {ANEW}")  # fmt: skip
        if (time - self._last) * (self._last - self._first) < 0:
            raise UserError(f"the model was called at t = {time:.6g} after {self._last:.6g}, in a run that began at "
                            f"{self._first:.6g}; {ANEW}; {SEVERAL}")  # fmt: skip
        return time


def _time(t: Tensor) -> float | None:
    """The time of a call; None for an empty batch."""
    time = time_of(t)
    if time is None and t.numel():
        low, high = torch.stack(t.detach().aminmax()).tolist()
        if low != high and not math.isnan(low):
            raise UserError(f"t must be one time for the whole batch, got {low:.6g} to {high:.6g}")
        time = low
    if time is not None and not math.isfinite(time):
        raise UserError(f"t must be finite, got {time}")
    return time


def _times(given: Any) -> list[float]:
    """The times that a caller gives, as floats."""
    times = given.tolist() if hasattr(given, "tolist") else given
    numbers = isinstance(times, Sequence) and all(isinstance(each, Real) and math.isfinite(each) for each in times)
    if not numbers or isinstance(times, str):
        raise UserError(f"a run must be a number of steps, times or model calls, got {shorten(repr(given))}")
    steps = [after - before for before, after in pairwise(times)]
    if not (all(step < 0 for step in steps) or all(step > 0 for step in steps)):
        raise UserError(f"times must fall, or rise, from each to the next, got {shorten(repr(given))}; {SEVERAL}")
    return [float(each) for each in times]
