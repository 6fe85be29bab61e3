"""A model with a cache, for loops of one's own: any module that is called with a time."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from haste.caching.cached_model import CachedModel
from haste.caching.clocks import Arguments, LoopClock, is_watched, signature
from haste.caching.config import CacheConfig
from haste.caching.model_cache import ModelCache
from haste.caching.report import CacheReport
from haste.caching.schedule import Plan
from haste.errors import UserError


class CachedModule(nn.Module):
    """Called like the model, it returns what the model returns, most of it forecast. The model is not changed.

    Args:
        model: any module that is called with a time: `timestep`, `timesteps`, `t`, `time` or `sigma`.
        config, defaults: as of ModelCache.

    Raises:
        UserError: contradicting settings.
    """

    def __init__(self, model: nn.Module, config: CacheConfig, defaults: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.training = model.training
        self._cache = ModelCache(model, config, defaults)
        self._arguments = Arguments(model)
        self._clock: LoopClock | None = None
        self._context: str | None = None

    @property
    def report(self) -> CacheReport:
        """What the cache did in this run, or the last."""
        return self._cache.report

    @property
    def full_steps(self) -> list[int]:
        return self.report.full_steps

    @property
    def cache_bytes(self) -> int:
        """Bytes of the features, 0 before the first call."""
        return round(self.report.mib * 2**20)

    def compile(self, *args: Any, **kwargs: Any) -> CachedModule:
        """Compile the model in place, with arguments of torch.compile. Forecast calls, which run little, are not."""
        self.model.compile(*args, **kwargs)
        return self

    def start(self, plan: Plan) -> None:
        """Begin a run.

        Args:
            plan: the number of steps, or their times; or all calls, as `haste.samplers.model_calls` lists them. The
                calls at one time are one step.
        """
        self._clock = LoopClock(plan, self._cache.begin)

    def release(self) -> None:
        """End the run and free the memory of the features."""
        self._clock = None
        self._cache.release()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, computed in full or forecast.

        Raises:
            UserError: no run has begun, or the call is not in its plan.
        """
        if self._clock is None:
            raise UserError("no run has begun; call start(number of steps) before the first call")
        named = self._arguments.named(args, kwargs)
        moment = self._clock.moment(lambda: self._arguments.time(named), named, self._context)
        try:
            return self._cache.call(self._run, self._run_eagerly, args, kwargs, moment, signature(named))
        except BaseException:
            self._clock.interrupt()
            raise

    def _run(self, args: tuple, kwargs: dict) -> Any:
        return self.model(*args, **kwargs)

    def _run_eagerly(self, args: tuple, kwargs: dict) -> Any:
        return self.model._call_impl(*args, **kwargs)  # what torch.nn.Module calls without a compilation

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Name the guidance branch of the calls inside, as diffusers' models do."""
        inner: AbstractContextManager = nullcontext()
        if hasattr(self.model, "cache_context"):
            inner = self.model.cache_context(name, **kwargs)
        self._context = name
        try:
            with inner:
                yield
        finally:
            self._context = None

    def __getattr__(self, name: str) -> Any:
        """The model's own attributes. Other forward passes, such as DiT's forward_with_cfg, run on the cached model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("model"), name)
        if name.startswith("forward") and isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self)
        return value


def check_can_be_cached(model: nn.Module) -> None:
    """Refuse what a cache cannot go around.

    Raises:
        UserError: a wrapper of torch.compile, or another cache.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UserError("model must not be wrapped by torch.compile(model), got a wrapper; call model.compile(), which "
                        "compiles in place, and give the model itself")  # fmt: skip
    if getattr(model, "is_cache_enabled", False):
        raise UserError(f"the model must have no other cache, got a {name} with diffusers' enable_cache on; call its "
                        "disable_cache() first")  # fmt: skip
    if getattr(model, "_is_cached", False):
        raise UserError(f"the model must have no other cache, got a {name} with cache-dit's on; disable that first")
    if isinstance(model, (CachedModel, CachedModule)) or is_watched(model):
        raise UserError("the model has a cache already; disable_cache it before another is enabled")
