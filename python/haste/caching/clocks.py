"""Where in a run each call of a model is: read from the times that it is called with, or from a pipeline's scheduler.

Calls at one time are the guidance branches of one step: named by diffusers' cache_context, or told apart by what they
are conditioned on, or by their order.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from haste.caching.discovery import tensors
from haste.caching.model_cache import Moment
from haste.caching.schedule import Clock, Plan
from haste.errors import UserError
from haste.samplers import ModelCall, time_of

# The names of a time and of numbers that follow it, among the arguments of models.
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "vision_timesteps")
COUNTERS = (*TIME_ARGUMENTS, "step_index", "step", "r_timestep", "timestep_r")  # of flow maps also where a step ends

# ---- what a call was made with ----


class Arguments:
    """The arguments of calls of a model, by name.

    Raises:
        UserError: from `time`: no time among them, or several.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature = inspect.signature(type(model).forward)
        self.parameters = list(self._signature.parameters)

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments that are not None."""
        try:
            bound = self._signature.bind_partial(self._model, *args, **kwargs).arguments
        except TypeError:  # the model itself says what is wrong
            bound = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        flat: dict[str, Any] = {}
        for name, value in list(bound.items())[1 if self._signature.parameters else 0 :]:
            extra = self._signature.parameters.get(name)
            varied = extra is not None and extra.kind is inspect.Parameter.VAR_KEYWORD
            flat.update(value if varied else {name: value})
        return {name: value for name, value in flat.items() if value is not None}

    def time(self, named: Mapping[str, Any]) -> float:
        """The time of a call, which is read from its device."""
        found = next((named[name] for name in TIME_ARGUMENTS if name in named), None)
        if found is None:
            raise UserError(f"the model must be called with a time ({', '.join(TIME_ARGUMENTS)}) for its steps to be "
                            f"told apart, got {', '.join(named)}")  # fmt: skip
        time = time_of(found) if isinstance(found, Tensor) else float(found)
        if time is None:
            low, high = torch.stack(found.detach().aminmax()).tolist() if found.numel() else (math.nan, math.nan)
            if low < high:
                raise UserError(f"timestep must be one time for the whole batch in a cached model, got {low:.6g} to "
                                f"{high:.6g}; samplers with a time per token or frame cannot be cached")  # fmt: skip
            time = float(low)
        if not math.isfinite(time):
            raise UserError(f"timestep must be finite, got {time}")
        return time


def signature(named: Mapping[str, Any]) -> Hashable:
    """Shapes, types and devices of all tensors, and all other small values, without the time."""
    return tuple((name, _signature(named[name])) for name in sorted(named) if name not in COUNTERS)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_signature, value))
    if isinstance(value, Mapping):
        return tuple((str(name), _signature(part)) for name, part in value.items())
    return value if isinstance(value, (int, float, str)) else type(value)


class BranchNames:
    """Names the guidance branch of each call of a step.

    With a name from cache_context it is that. Else a call on the same condition, which is to say with the same tensors
    and a like signature, as a branch of an earlier step continues that branch; else the calls of a step are numbered.
    """

    def __init__(self) -> None:
        # Of each branch; the tensors are held, so that no others have their identity.
        self._condition: dict[Hashable, tuple[Hashable, list[Tensor]]] = {}
        self._used: set[Hashable] = set()

    def next_step(self) -> None:
        """Calls from now on belong to another step."""
        self._used.clear()

    def name(self, named: Mapping[str, Any], context: str | None, again: bool) -> Hashable:
        """Name the branch of a call. again: a second call of a branch in a step is possible, as Heun's at one time."""
        if context is not None:
            return context
        times = [value for name, value in named.items() if name in COUNTERS]
        condition = [t for t in tensors(dict(named)) if not any(t is time for time in times)][1:]  # without x
        made_with = signature(named)
        for branch, (earlier, known) in self._condition.items():
            same = earlier == made_with and len(known) == len(condition)
            same = same and all(a is b for a, b in zip(known, condition, strict=True))
            if same and (again or branch not in self._used):
                self._used.add(branch)
                return branch
        number = len(self._used)
        while number in self._used:
            number += 1
        self._condition[number] = made_with, condition
        self._used.add(number)
        return number


# ---- a loop of one's own ----


class LoopClock:
    """Reads the time of each call and holds it against the plan of the run.

    The calls at one time belong to one step. The first time of the run, seen again after others or after an error,
    begins a new run.

    Args:
        plan: the number of steps; or their times; or all calls, as `haste.samplers.model_calls` lists them.
        begin: called with the number of steps when a run begins.

    Raises:
        UserError: from `moment`, for a call that is not in the plan.
    """

    def __init__(self, plan: Plan, begin: Callable[[int], None]) -> None:
        self.plan = plan
        self._begin = begin
        self._listed = None
        if isinstance(plan, Sequence) and plan and isinstance(plan[0], ModelCall):
            self._listed = Clock(plan)
            self._times: list[float] = []
            self._num_steps = self._listed.plan[-1].step + 1
        else:
            checked = Clock(plan).plan  # checks it
            self._times = [] if isinstance(plan, Integral) else [call.time for call in checked]
            self._num_steps = len(checked)
        self.start()

    def start(self) -> None:
        """Begin a run."""
        if self._listed is not None:
            self._listed = Clock(self.plan)
        self._seen: list[float] = []
        self._interrupted = False
        self._names = BranchNames()
        self._begin(self._num_steps)

    def interrupt(self) -> None:
        """A call has failed; its loop may begin anew."""
        self._interrupted = True

    def moment(self, time: Callable[[], float], named: Mapping[str, Any], context: str | None) -> Moment:
        """The place of the next call. time: reads its time."""
        now = time()
        if self._listed is not None:
            return self._next_listed(now, named)
        if self._seen and (len(self._seen) > 1 or self._interrupted) and self._same(now, self._seen[0]):
            self.start()
        if not self._seen or not self._same(now, self._seen[-1]):
            self._check(now)
            self._seen.append(now)
            self._names.next_step()
        step = len(self._seen) - 1
        return Moment(step, step, self._seen[-1], self._names.name(named, context, again=True))

    def _next_listed(self, now: float, named: Mapping[str, Any]) -> Moment:
        assert self._listed is not None
        at = torch.tensor(now, dtype=torch.float64 if isinstance(now, float) else None)
        call = self._listed.next_call(at)
        if call is None:
            self.start()
            return self._next_listed(now, named)
        self._listed.count(call)
        return Moment(call.step, call.position, call.time, call.branches)

    def _check(self, now: float) -> None:
        step = len(self._seen)
        way_out = "before another run call start()"
        if step == self._num_steps:
            raise UserError(f"num_steps must be the number of times that the model is called at, got {step}, and the "
                            f"model was called at {now:.6g} after {self._seen[-1]:.6g}; {way_out}")  # fmt: skip
        if self._times and not self._same(now, self._times[step]):
            raise UserError(f"times must be those that the model is called at, got {self._times[step]:.6g} for step "
                            f"{step}, where it was called at {now:.6g}; {way_out}")  # fmt: skip
        if step > 1 and (now - self._seen[-1]) * (self._seen[-1] - self._seen[-2]) < 0:
            raise UserError(f"timestep must fall, or rise, from step to step, got {now:.6g} after "
                            f"{self._seen[-1]:.6g}; {way_out}")  # fmt: skip

    def _same(self, a: float, b: float) -> bool:
        """Equal up to the rounding of times in bfloat16, but never as far off as a neighbour."""
        scale = max(map(abs, [*self._times, *self._seen, a]), default=1.0)
        gaps = [abs(one - other) for one, other in [*pairwise(self._times), *pairwise(self._seen)]]
        return abs(a - b) <= min([scale * 2**-8, *(gap / 3 for gap in gaps)]) if self._times else a == b


# ---- a pipeline's scheduler ----


class SchedulerClock:
    """Follows the scheduler of diffusers' pipelines: `set_timesteps` begins a run, `step` ends an evaluation.

    The scheduler is watched by a subclass put on this instance, which its copies do not report to. Times that follow
    each other and are equal, as in Heun's method, are one step.
    """

    _clocks: WeakKeyDictionary[Any, SchedulerClock] = WeakKeyDictionary()

    @classmethod
    def of(cls, scheduler: Any) -> SchedulerClock:
        """The clock of a scheduler, which pipelines that share it share."""
        if scheduler not in cls._clocks:
            cls._clocks[scheduler] = cls(scheduler)
        clock = cls._clocks[scheduler]
        clock._users += 1
        return clock

    def __init__(self, scheduler: Any) -> None:
        self.runs = 0
        self._users = 0
        self._evaluation = 0
        self._copies_stepped = 0
        self._timesteps: list[float] = []
        self._offset = 0
        watch(scheduler, {"set_timesteps": self._after_setting, "step": self._after_step})

    def leave(self, scheduler: Any) -> None:
        """One user less; the last one lets go of the scheduler."""
        self._users -= 1
        if not self._users:
            unwatch(scheduler)
            self._clocks.pop(scheduler, None)

    def _after_setting(self, original: bool, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        result = call(*args, **kwargs)
        if original:
            self.runs += 1
            self._timesteps = []
        return result

    def _after_step(self, original: bool, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if original and not self._evaluation and self._timesteps:
            self._correct_offset(args[1] if len(args) > 1 else kwargs.get("timestep"))
        self._evaluation += original
        self._copies_stepped += not original
        return call(*args, **kwargs)

    def _correct_offset(self, timestep: Any) -> None:
        """Find the first time of a run that begins later, as image-to-image does, with a scheduler that is not told."""
        now = float(timestep) if timestep is not None else self._timesteps[self._offset]
        if now in self._timesteps and now != self._timesteps[self._offset]:
            self._offset = self._timesteps.index(now)

    def moment(self, scheduler: Any) -> tuple[int, int, int, float] | None:
        """Of a model call now: the number of its run, of the evaluation and of the step in the run, and the time.

        None after the last step of a run: another pipeline, with a scheduler of its own, shares the model.

        Raises:
            UserError: the pipeline steps copies of its scheduler alone.
        """
        if not self._timesteps:
            timesteps = getattr(scheduler, "timesteps", None)
            self._timesteps = torch.as_tensor(timesteps).double().tolist() if timesteps is not None else []
            if not self._timesteps:
                raise UserError(f"the pipeline must set the timesteps of its scheduler, got a "
                                f"{type(scheduler).__name__} without; {OWN_LOOP}")  # fmt: skip
            self._offset = getattr(scheduler, "begin_index", None) or 0
            self._evaluation = self._copies_stepped = 0
        if self._copies_stepped and not self._evaluation:
            raise UserError(f"the pipeline must step its scheduler, got steps of copies of it alone, as where frames "
                            f"have times of their own; {OWN_LOOP}")  # fmt: skip
        index = self._offset + self._evaluation
        if index >= len(self._timesteps):
            return None
        return self.runs, self._evaluation, self._distinct(self._offset, index), self._timesteps[index]

    @property
    def num_steps(self) -> int:
        """Of the present run."""
        return self._distinct(self._offset, len(self._timesteps) - 1) + 1

    def _distinct(self, first: int, last: int) -> int:
        """How often the time changes between two evaluations."""
        return sum(a != b for a, b in pairwise(self._timesteps[first : last + 1]))


OWN_LOOP = "cache its transformer alone, in a loop of your own: enable_cache(model, num_steps=...)"


# Parts of the names of schedulers that add noise at every step whatever their settings are.
NOISY = ("LCM", "Ancestral", "SDE", "DDPM", "TCD", "SCM", "SASolver", "UnCLIP", "CosineDPM", "CogVideoXDPM", "CMStoch")


def is_noisy(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers adds noise at every step."""
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    by_setting = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling", False)
    return bool(by_setting) or any(word in name for word in NOISY)


# ---- methods around those of one instance ----

Around = Callable[[bool, Callable[..., Any], tuple, dict], Any]
"""around(original, call, args, kwargs) in place of call(*args, **kwargs); original: not of a copy of the instance."""


def watch(instance: Any, methods: Mapping[str, Around]) -> None:
    """Put a subclass on this instance, whose methods go around its own.

    Unlike functions in the instance's attributes it survives what reinstalls these, as offloading does, and copies of
    the instance know that they are copies.
    """
    unwatch(instance)  # of a copy
    cls, original = type(instance), weakref.ref(instance)

    def around(name: str, how: Around) -> Callable[..., Any]:
        inner = getattr(cls, name)

        @functools.wraps(inner)  # pipelines look at the signatures of their schedulers
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return how(self is original(), functools.partial(inner, self), args, kwargs)

        return method

    own = {name: around(name, how) for name, how in methods.items() if hasattr(cls, name)}
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    watched = {**named, **own, "_haste_watched": cls, "_haste_original": original}
    instance.__class__ = _same_as(cls)(cls.__name__, (cls,), watched)


def unwatch(instance: Any) -> None:
    """Give the instance its own class back."""
    cls = type(instance).__dict__.get("_haste_watched")
    if cls is not None:
        instance.__class__ = cls


def is_watched(instance: Any) -> bool:
    """Whether `watch` put a subclass on it, and not on what it is a copy of."""
    original = type(instance).__dict__.get("_haste_original")
    return original is not None and original() is instance


def _same_as(cls: type) -> type[type]:
    """The type of subclasses of cls that are equal to it, for diffusers' from_pipe compares the types of models."""
    equal = {"__eq__": lambda self, other: self is other or other is cls, "__hash__": lambda self: hash(cls)}
    return type(type(cls).__name__, (type(cls),), equal)
