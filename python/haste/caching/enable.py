"""From settings to a cached model and back, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from haste.caching.cached_model import MOST_AHEAD, CachedModel
from haste.caching.config import FAST, CacheConfig
from haste.errors import UserError
from haste.samplers import ModelCall


def enable_cache(
    model: nn.Module,
    config: CacheConfig | None = None,
    *,
    num_steps: int | None = None,
    times: Sequence[float] | None = None,
    model_calls: Sequence[ModelCall] | None = None,
    **settings: Any,
) -> CachedModel:
    """The model with a cache in front of it, for `haste.samplers.sample` or a sampling loop of your own.

        fast = enable_cache(model, num_steps=50)
        ...                                      # the loop calls fast(x, t, y) where it called model(x, t, y)
        model = disable_cache(fast)

    Every further run, of the next batch say, begins with fast.start(num_steps); one that begins at the first time of
    the run before needs no word. The t of every call is read, which a GPU is waited for. The forecast that counts in
    times, Newton's, goes by it, however the times are spaced, and a call out of step with the plan is refused. Guidance
    in one batch of twice the size needs nothing more. Where its halves are called one after the other, or a solver
    calls the model more than once a step, a number does not tell which call is which: pass
    `haste.samplers.model_calls(...)`, or a list like it with the times that the loop calls with.

    Args:
        model: of one of haste's families, or one of the public repositories' SiT and DiT. It is not touched.
        config: which steps are full and what stands in for the others. By default newton per model, one full step in
            six, order 2.
        num_steps: start a run of so many calls at once, one per step.
        times: start a run of calls at these times, one per step; every call is held against them.
        model_calls: start a run of these.
        settings: fields of CacheConfig that change `config`; with `cache`, and no config, all others have
            CacheConfig's defaults.

    Raises:
        UserError: settings that make no sense, a model that no cache knows, more than one plan.
    """
    if config is None:
        config = CacheConfig() if "cache" in settings else FAST
    cached = make_cache(model, replace(config, **settings))
    if cached is None:
        raise UserError('cache is "none"; it must name a forecaster, or be delta-dit')
    plans = [plan for plan in (num_steps, times, model_calls) if plan is not None]
    if len(plans) > 1:
        raise UserError("a run must have one of num_steps, times and model_calls, got several")
    if plans:
        cached.start(plans[0])
    return cached


def disable_cache(model: nn.Module) -> nn.Module:
    """The model without its cache, whose memory is freed; a model that has none comes back as it is.

    Args:
        model: what `enable_cache` returned.
    """
    if not isinstance(model, CachedModel):
        return model
    model.release()
    return model.model


def make_cache(model: nn.Module, config: CacheConfig) -> CachedModel | None:
    """`enable_cache` for settings that may ask for no cache; then None.

    Raises:
        UserError: settings that make no sense, a model that no cache knows.
    """
    config.check_cache()
    if config.cache == "none":
        return None
    if isinstance(model, CachedModel):
        raise UserError("the model has a cache already; disable_cache it before another is enabled")
    return CachedModel(model, config)


def cache_bytes(model: nn.Module, config: CacheConfig, rows: int, dtype: torch.dtype | None = None) -> int:
    """Bytes that a cache will take: cached features, and the corrections of the forecast steps in a row. (Heun's
    sampler needs one correction more.)

    Args:
        rows: images at once, both halves of a guided batch counted.
        dtype: of the features; by default the model's.
    """
    cached = make_cache(model, config)
    if cached is None:
        return 0
    tokens, dim = cached.transformer.tokens_shape
    granularity, slots = cached.granularities[0], cached.forecaster.order + 1
    ahead = 0
    if granularity.looks_ahead:
        ahead = MOST_AHEAD if config.full_steps else min(MOST_AHEAD, config.resolved_interval - 1)
    features, corrections = granularity.modules * slots * tokens, ahead * (tokens + 1)  # and the conditioning
    return (features + corrections) * rows * dim * (dtype or cached.dtype).itemsize


def check_memory(
    model: nn.Module, config: CacheConfig, images: int, guided: bool = False, free: int | None = None
) -> None:
    """Refuse a cache that does not fit into memory.

    Args:
        images: at once.
        free: bytes; by default what the device of the model has left.

    Raises:
        UserError: it does not fit; says what would.
    """
    rows = 2 * images if guided else images
    needed = cache_bytes(model, config, rows)
    free = free_bytes(next(model.parameters()).device) if free is None else free
    if needed <= free:
        return
    per = "" if config.cache == "delta-dit" else f" per {config.granularity}"
    message = (f"the cache{per} takes {needed / 2**30:.1f} GiB for {images} images at once, and {free / 2**30:.1f} GiB "
               "are free")  # fmt: skip
    if config.granularity == "module" and config.cache != "delta-dit":
        whole = cache_bytes(model, replace(config, granularity="model"), rows)
        if whole <= free:
            raise UserError(f"{message}; --granularity model takes {whole / 2**30:.1f} GiB")
    fitting = images * free // needed
    would = f"{fitting} images at once (--per-proc-batch-size) would fit" if fitting else "not even one image fits"
    raise UserError(f"{message}; {would}")


def free_bytes(device: torch.device) -> int:
    """What is left of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        (available,) = (line for line in file if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])
