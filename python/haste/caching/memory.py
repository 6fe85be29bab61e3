"""How much memory the snapshots of a run will take, and what is made of them ahead of time, before the first step."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch
from torch import nn

from haste.caching.build import make_cache
from haste.caching.corrections import MOST_AHEAD
from haste.caching.settings import CacheSettings
from haste.errors import UserError


def cache_bytes(model: nn.Module, settings: CacheSettings, rows: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the snapshots of `rows` pictures at once, both halves of a guided batch counted, and of the corrections
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
    model: nn.Module, settings: CacheSettings, pictures: int, guided: bool = False, free: int | None = None
) -> None:
    """UserError if the snapshots of so many pictures at once do not fit, with what would.

    free: bytes; by default what the device of the model has left.
    """
    rows = 2 * pictures if guided else pictures
    needed = cache_bytes(model, settings, rows)
    free = free_bytes(next(model.parameters()).device) if free is None else free
    if needed <= free:
        return
    per = "" if settings.cache == "delta-dit" else f" per {settings.granularity}"
    message = (
        f"the cache{per} takes {needed / 2**30:.1f} GiB for {pictures} pictures at once, and "
        f"{free / 2**30:.1f} GiB are free"
    )
    if settings.granularity == "module" and settings.cache != "delta-dit":
        whole = cache_bytes(model, replace(settings, granularity="model"), rows)
        if whole <= free:
            raise UserError(f"{message}; --granularity model takes {whole / 2**30:.1f} GiB")
    fitting = pictures * free // needed
    would = f"{fitting} pictures at once (--per-proc-batch-size) would fit" if fitting else "not even one picture fits"
    raise UserError(f"{message}; {would}")


def free_bytes(device: torch.device) -> int:
    """What is left of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
