"""How much memory the snapshots of a run will take, and what is made of them ahead of time, before the first step.

From settings to a cached model, and back to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import nn

from haste.caching.adapters import adapt, delta_dit_gate, delta_dit_groups, make_region
from haste.caching.cached_model import MOST_AHEAD, CachedModel
from haste.caching.config import FAST, CacheConfig
from haste.caching.forecaster import make_forecaster
from haste.caching.schedule import AdaptiveSchedule, IntervalSchedule, ListedSchedule, Schedule
from haste.errors import UserError
from haste.samplers import ModelCall


def cache_bytes(model: nn.Module, settings: CacheConfig, rows: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the snapshots of `rows` images at once, both halves of a guided batch counted, and of the corrections
    of the skipped steps in a row. (Heun's sampler needs one correction more.)

    dtype: of the snapshots; by default the model's.
    """
    cached = make_cache(model, settings)
    if cached is None:
        return 0
    tokens, dim = cached.transformer.tokens_shape
    region, slots = cached.regions[0], cached.forecaster.order + 1
    ahead = 0
    if region.looks_ahead:
        ahead = MOST_AHEAD if settings.full_steps else min(MOST_AHEAD, settings.resolved_interval - 1)
    snapshots, corrections = region.modules * slots * tokens, ahead * (tokens + 1)  # and the conditioning
    return (snapshots + corrections) * rows * dim * (dtype or cached.dtype).itemsize


def check_memory(
    model: nn.Module, settings: CacheConfig, images: int, guided: bool = False, free: int | None = None
) -> None:
    """UserError if the snapshots of so many images at once do not fit, with what would.

    free: bytes; by default what the device of the model has left.
    """
    rows = 2 * images if guided else images
    needed = cache_bytes(model, settings, rows)
    free = free_bytes(next(model.parameters()).device) if free is None else free
    if needed <= free:
        return
    per = "" if settings.cache == "delta-dit" else f" per {settings.granularity}"
    message = (
        f"the cache{per} takes {needed / 2**30:.1f} GiB for {images} images at once, and "
        f"{free / 2**30:.1f} GiB are free"
    )
    if settings.granularity == "module" and settings.cache != "delta-dit":
        whole = cache_bytes(model, replace(settings, granularity="model"), rows)
        if whole <= free:
            raise UserError(f"{message}; --granularity model takes {whole / 2**30:.1f} GiB")
    fitting = images * free // needed
    would = f"{fitting} images at once (--per-proc-batch-size) would fit" if fitting else "not even one image fits"
    raise UserError(f"{message}; {would}")


def free_bytes(device: torch.device) -> int:
    """What is left of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def make_cache(model: nn.Module, settings: CacheConfig) -> CachedModel | None:
    """The model with a cache around it, not touched itself; None where the settings ask for no cache.

    Raises UserError for settings that make no sense, and for a model that a cache does not know.
    """
    settings.check_cache()
    if settings.cache == "none":
        return None
    if isinstance(model, CachedModel):
        raise UserError("the model has a cache already; unwrap it before another is wrapped around it")
    transformer = adapt(model)
    schedule = make_schedule(settings)
    first_enhance = schedule.first_enhance if isinstance(schedule, IntervalSchedule) else 1
    forecaster = make_forecaster(settings.cache, settings.resolved_order, first_enhance)
    if settings.cache == "delta-dit":
        groups = delta_dit_groups(transformer, settings.cached_blocks)
        return CachedModel(model, transformer, schedule, forecaster, groups, delta_dit_gate(settings.gate))
    return CachedModel(model, transformer, schedule, forecaster, [make_region(transformer, settings.granularity)])


def make_schedule(settings: CacheConfig) -> Schedule:
    """An explicit list, one that adapts to a bound on the error, or TaylorSeer's interval."""
    if settings.full_steps:
        return ListedSchedule(tuple(settings.full_step_list))
    if settings.error_threshold:
        return AdaptiveSchedule(settings.error_threshold, settings.resolved_interval, settings.resolved_first_enhance)
    return IntervalSchedule(settings.resolved_interval, settings.resolved_first_enhance)


def enable_cache(
    model: nn.Module,
    *,
    num_steps: int | None = None,
    times: Sequence[float] | None = None,
    evaluations: Sequence[ModelCall] | None = None,
    **settings: Any,
) -> CachedModel:
    """A cache around a SiT or DiT, for a sampling loop of your own.

        fast = wrap(model, num_steps=50)
        ...                                      # the loop calls fast(x, t, y) where it called model(x, t, y)
        model = unwrap(fast)

    Every further run, of the next batch say, begins with fast.start(num_steps); one that begins at the first time of
    the run before needs no word. The t of every call is read, which a GPU is waited for. The forecast that counts in
    times, Newton's, goes by it, however the times are spaced, and a call out of step with the plan is refused. Guidance
    in one batch of twice the size needs nothing more. Where its halves are called one after the other, or a solver
    evaluates the model more than once a step, a number does not tell which call is which: pass
    `haste.sampling.evaluations(...)`, or a list like it with the times that the loop calls with.

    Args:
        model: haste's SiT, or one of the public repositories' SiT and DiT.
        num_steps: start a run of so many evaluations at once, one per step.
        times: start a run of evaluations at these times, one per step; every call is held against them.
        evaluations: start a run of these.
        settings: fields of CacheSettings; without `cache`, changes to `FAST`.

    Raises:
        UserError: settings that make no sense, a model that is not known, more than one plan.
    """
    cached = make_cache(model, CacheConfig(**settings) if "cache" in settings else replace(FAST, **settings))
    if cached is None:
        raise UserError('cache is "none"; it must name a forecaster, or be delta-dit')
    plans = [plan for plan in (num_steps, times, evaluations) if plan is not None]
    if len(plans) > 1:
        raise UserError("a run must have one of num_steps, times and evaluations, got several")
    if plans:
        cached.start(plans[0])
    return cached


def disable_cache(model: nn.Module) -> nn.Module:
    """The model without its cache, whose memory is let go of; a model that has none comes back as it is."""
    if not isinstance(model, CachedModel):
        return model
    model.release()
    return model.model
