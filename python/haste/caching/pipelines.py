"""A cache in a pipeline of diffusers: its models are called through it, and its scheduler is the clock.

Nothing of diffusers is imported. The pipeline and its models keep their types' names, parameters and files.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from haste.caching.cached_module import check_can_be_cached
from haste.caching.clocks import (
    TIME_ARGUMENTS,
    Arguments,
    BranchNames,
    SchedulerClock,
    is_noisy,
    signature,
    unwatch,
    watch,
)
from haste.caching.config import CacheConfig
from haste.caching.model_cache import ModelCache, Moment
from haste.caching.report import CacheReport
from haste.errors import UserError

MOST_CALLS = 16  # of a model between two steps of the scheduler


class CachedPipeline:
    """A pipeline with a cache; calling it calls the pipeline.

    Args:
        pipeline: of diffusers, or with `components` and a `scheduler` alike.
        config, defaults: as of ModelCache.

    Attributes:
        pipeline: as given, with the cache in place until `disable`.

    Raises:
        UserError: no model or no scheduler, contradicting settings, another cache.
    """

    def __init__(self, pipeline: Any, config: CacheConfig, defaults: frozenset[str] = frozenset()) -> None:
        self.pipeline = pipeline
        self.config = config
        models = denoisers(pipeline)
        name = type(pipeline).__name__
        if not models:
            raise UserError(f"the pipeline must have a model that is called with a timestep, got a {name} with "
                            f"{', '.join(pipeline.components)}")  # fmt: skip
        if not hasattr(getattr(pipeline, "scheduler", None), "set_timesteps"):
            raise UserError(f"the pipeline must have a scheduler with set_timesteps, got a {name} without; cache its "
                            "model in a loop of your own: enable_cache(model, num_steps=...)")  # fmt: skip
        for model in models.values():
            check_can_be_cached(model)
        clock = _Clock(pipeline)
        self._models = {name: _CachedPart(self, model, clock, config, defaults) for name, model in models.items()}
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipeline(*args, **kwargs)

    @property
    def report(self) -> CacheReport:
        """What the cache did in the last run."""
        return CacheReport.of_parts({name: part.cache.report for name, part in self._models.items()})

    def disable(self) -> None:
        """Take the cache out of the pipeline and free its memory."""
        for part in self._models.values():
            part.leave()
        self._clock.leave()


def is_pipeline(value: Any) -> bool:
    """Whether it is one of diffusers' pipelines, or like them."""
    return not isinstance(value, nn.Module) and isinstance(getattr(value, "components", None), dict)


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that are called at every step: all that take a time, but VAEs and controls."""
    found = {}
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module) or hasattr(part, "decode") or "control" in name:
            continue
        model = getattr(part, "_orig_mod", part)
        if set(Arguments(model).parameters) & set(TIME_ARGUMENTS):
            found[name] = part
    return found


class _Clock:
    """The clock of a pipeline's present scheduler, which its user may replace."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._scheduler = pipeline.scheduler
        self._clock = SchedulerClock.of(self._scheduler)
        self._replaced = 0

    def moment(self) -> tuple[tuple[int, int], int, int, float] | None:
        """As SchedulerClock.moment; the number of the run counts schedulers too."""
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self._scheduler:
            self.leave()
            self._scheduler = pipeline.scheduler
            self._clock = SchedulerClock.of(self._scheduler)
            self._replaced += 1
        moment = self._clock.moment(self._scheduler)
        if moment is None:
            return None
        run, evaluation, step, time = moment
        return (self._replaced, run), evaluation, step, time

    @property
    def num_steps(self) -> int:
        return self._clock.num_steps

    @property
    def noisy(self) -> bool:
        return is_noisy(self._scheduler)

    def leave(self) -> None:
        self._clock.leave(self._scheduler)


class _CachedPart:
    """A model of a pipeline, called through its cache. It keeps the cached pipeline alive."""

    def __init__(
        self, owner: CachedPipeline, model: nn.Module, clock: _Clock, config: CacheConfig, defaults: frozenset[str]
    ) -> None:
        self.owner = owner
        self.model = model
        self.cache = ModelCache(model, config, defaults)
        self._clock = clock
        self._arguments = Arguments(model)
        self._context: str | None = None
        self._run: Any = None
        self._evaluation = -1
        self._calls = 0
        own = {"__call__": self._call, "cache_context": self._cache_context, "__reduce_ex__": self._reduce}
        watch(model, own)

    def leave(self) -> None:
        unwatch(self.model)
        self.cache.release()

    def _call(self, original: bool, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        moment = self._clock.moment() if original else None
        if moment is None:  # a copy of the model, or a call that is not of this pipeline
            return call(*args, **kwargs)
        run, evaluation, step, time = moment
        if run != self._run:
            self.cache.begin(self._clock.num_steps, self._clock.noisy)
            self._run, self._evaluation, self._names = run, -1, BranchNames()
        if evaluation != self._evaluation:
            self._evaluation, self._calls = evaluation, 0
            self._names.next_step()
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise UserError(f"the pipeline's scheduler must be stepped after calls of the model, got {self._calls} "
                            "calls without; disable_cache(pipeline) to use the model elsewhere")  # fmt: skip
        named = self._arguments.named(args, kwargs)
        branch = self._names.name(named, self._context, again=False)
        return self.cache.call(
            lambda args, kwargs: call(*args, **kwargs),
            lambda args, kwargs: self.model._call_impl(*args, **kwargs),
            args,
            kwargs,
            Moment(step, step, time, branch),
            signature(named),
        )

    def _reduce(self, original: bool, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """What copies and pickles are made of: the model's own class."""
        _, (watched, *parts), *state = call(*args, **kwargs)
        return _new, (watched.__bases__[0], *parts), *state

    def _cache_context(self, original: bool, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        name = args[0] if args else kwargs["name"]
        return self._in_context(name, call(*args, **kwargs)) if original else call(*args, **kwargs)

    @contextmanager
    def _in_context(self, name: str, inner: Any) -> Iterator[None]:
        self._context = name
        try:
            with inner:
                yield
        finally:
            self._context = None


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)
