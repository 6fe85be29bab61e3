"""Add a cache to a model or a pipeline, and take it away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from haste.caching.adapters import can_take_apart, is_made_in_parts
from haste.caching.cached_model import CachedModel
from haste.caching.cached_module import CachedModule, check_can_be_cached
from haste.caching.config import CacheConfig, chosen_config
from haste.caching.parts import CachedParts
from haste.caching.pipelines import CachedPipeline, is_pipeline
from haste.errors import UserError
from haste.samplers import ModelCall
from haste.validation import shown

# A pipeline keeps its cache alive, by way of its models; not this dictionary, which would keep the pipeline too.
_pipelines: WeakKeyDictionary[Any, ReferenceType[CachedPipeline]] = WeakKeyDictionary()


def enable_cache(
    model: Any,
    config: CacheConfig | None = None,
    *,
    num_steps: int | None = None,
    times: Sequence[float] | None = None,
    model_calls: Sequence[ModelCall] | None = None,
    **settings: Any,
) -> CachedModel | CachedModule | CachedParts | CachedPipeline:
    """Add a cache to a pipeline of diffusers, or to a model that a loop of your own calls.

        enable_cache(pipe)                       # in place; pipe(...) as ever, in a fraction of the time
        disable_cache(pipe)

        fast = enable_cache(model, num_steps=50)
        ...                                      # the loop calls fast(...) where it called model(...)
        model = disable_cache(fast)

    In a pipeline the scheduler tells steps apart, whatever its solver and however guidance calls the model. In a loop
    of your own the time of every call is read, for which the host waits for a GPU, and a call that is not in the plan
    is refused; calls at one time are one step. Every further run, such as of the next batch, begins with
    fast.start(num_steps), or without it when the loop comes back to the first time. For haste's own models, and SiT and
    DiT of the public repositories, a loop that calls the model several times at one time needs
    `haste.samplers.model_calls(...)` as its plan.

    Args:
        model: a pipeline of diffusers, with one or several transformers; a transformer of diffusers; a model of haste,
            or of the SiT, DiT and REPA repositories; any module that is called with a time. What a model's blocks are
            is found out at its first call; of modules without any the output can be cached (granularity "output").
        config: which steps are full and how the others are forecast. By default newton per model, order 2, and full
            steps at even distances of at most six steps, or of a quarter of a shorter run.
        num_steps: start a run of that many steps; not for a pipeline, which brings its own.
        times: start a run at these times, one per step; the time of every call is compared with them.
        model_calls: start a run of these calls.
        settings: fields of CacheConfig that change `config`; with `cache` and without `config`, the others have
            CacheConfig's defaults.

    Returns:
        The cached model, called like the model, or the cached pipeline. Its `report` says what the cache did.

    Raises:
        UserError: contradicting settings, a model that cannot be cached so, more than one of num_steps, times,
            model_calls.
    """
    plans = [plan for plan in (num_steps, times, model_calls) if plan is not None]
    if not isinstance(model, nn.Module) and not is_pipeline(model):
        raise UserError(f"model must be a torch.nn.Module or a pipeline of diffusers, got {shown(model)}")
    for call in model_calls or ():
        if not isinstance(call, ModelCall):
            raise UserError(f"model_calls must be what haste.samplers.model_calls returns, got {shown(model_calls)}")
    if is_made_in_parts(model):
        if plans:
            raise UserError("num_steps, times and model_calls must be left out for a model whose images are made in "
                            "parts: each run brings its own")  # fmt: skip
        settings = _in_parts(config, settings)
    config, defaults = _resolve(config, settings)
    if len(plans) > 1:
        raise UserError("a run must have one of num_steps, times and model_calls, got several")
    if is_pipeline(model):
        if plans:
            raise UserError("num_steps must be left out for a pipeline, which says it when it is called")
        if model in _pipelines:
            raise UserError("the pipeline has a cache already; disable_cache it before another is enabled")
        pipeline = CachedPipeline(model, config, defaults)
        _pipelines[model] = ref(pipeline)
        return pipeline
    made = make_cache(model, config, defaults)
    assert made is not None
    if plans:
        made.start(plans[0])
    return made


def _in_parts(config: CacheConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the granularity that models have whose images are made in parts."""
    if settings.get("granularity", "output") != "output":
        given = settings["granularity"]
        raise UserError(f"granularity must be output for a model whose images are made in parts, got {given}")
    return settings if config is not None or "cache" in settings else {**settings, "granularity": "output"}


def _resolve(config: CacheConfig | None, settings: dict[str, Any]) -> tuple[CacheConfig, frozenset[str]]:
    """The config, and the names of settings that nobody chose."""
    if not isinstance(config, CacheConfig | None):
        raise UserError(f"config must be a CacheConfig, got {shown(config)}; settings are keywords, such as "
                        "cache='taylor' or num_steps=50")  # fmt: skip
    config, defaults = chosen_config(config, settings)
    if config.cache == "none":
        raise UserError("cache must be reuse, taylor, newton, hermite or delta-dit, got none")
    return config, defaults


def make_cache(
    model: nn.Module, config: CacheConfig, defaults: frozenset[str] = frozenset()
) -> CachedModel | CachedModule | CachedParts | None:
    """`enable_cache` for a model and a config whose cache may be "none"; then None.

    Args:
        defaults: settings of the config that nobody chose; they shrink to fit a short run.

    Raises:
        UserError: contradicting settings, or a model that cannot be cached so.
    """
    if config.cache == "none":
        return None
    if is_made_in_parts(model):
        return CachedParts(model, config, defaults)
    check_can_be_cached(model)
    if can_take_apart(model, config):
        return CachedModel(model, config, defaults)
    return CachedModule(model, config, defaults)


def disable_cache(model: Any) -> Any:
    """Return the model or pipeline without its cache, whose memory is freed.

    Args:
        model: a pipeline, or what `enable_cache` returned. Without a cache it is returned unchanged.
    """
    if isinstance(model, CachedPipeline):
        model = model.pipeline
    if is_pipeline(model):
        pipeline = _pipelines.pop(model, lambda: None)()
        if pipeline is not None:
            pipeline.disable()
        return model
    if isinstance(model, (CachedModel, CachedModule, CachedParts)):
        model.release()
        return model.model
    return model


@contextmanager
def cached(
    model: Any, config: CacheConfig | None = None, **settings: Any
) -> Iterator[CachedModel | CachedModule | CachedParts | CachedPipeline]:
    """`enable_cache` for the length of a `with` block.

        with haste.cached(pipe) as fast:
            image = pipe(prompt).images[0]
        print(fast.report)

    Args:
        model, config, settings: as of `enable_cache`.

    Raises:
        UserError: as `enable_cache`.
    """
    made = enable_cache(model, config, **settings)
    try:
        yield made
    finally:
        disable_cache(made)
