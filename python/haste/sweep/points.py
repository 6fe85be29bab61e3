"""The points of a sweep: every combination of the settings it is asked for, and plain sampling beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from haste.caching.settings import CacheSettings
from haste.generation.settings import SamplingSettings


@dataclass(frozen=True)
class Grid:
    """The values of each setting; a point takes one of each. None stands for the setting's own default."""

    caches: Sequence[str]
    granularities: Sequence[str] = ("module",)
    intervals: Sequence[int | None] = (None,)
    orders: Sequence[int | None] = (None,)
    max_errors: Sequence[float] = (0.0,)
    gates: Sequence[int | None] = (None,)
    steps: Sequence[int] = (50,)

    def settings(self, base: SamplingSettings) -> Iterator[SamplingSettings]:
        """Every combination that means something, each once, upon `base`: reuse has no order, delta-dit gates alone."""
        for steps, cache, interval in product(self.steps, self.caches, self.intervals):
            own: dict[str, Sequence[Any]]
            if cache == "delta-dit":
                own = {"gate": self.gates}
            else:
                orders = self.orders if cache != "reuse" else (None,)
                own = {"granularity": self.granularities, "max_error": self.max_errors, "order": orders}
            for values in product(*own.values()):
                chosen = dict(zip(own, values, strict=True))
                yield replace(base, num_steps=steps, cache=cache, interval=interval, **chosen)


def plan(base: SamplingSettings, grids: Sequence[Grid], plain_steps: Sequence[int]) -> list[SamplingSettings]:
    """The points of a sweep, each once: the full runs from the longest on, then the cached ones in their order.

    A grid's own number of steps is run in full as well: it is what its cached runs are compared with.
    """
    counts = sorted({*plain_steps, *(steps for grid in grids for steps in grid.steps)}, reverse=True)
    plain = [replace(base, num_steps=count) for count in counts]
    cached = [settings for grid in grids for settings in grid.settings(base)]
    return list({point_key(settings): settings for settings in [*plain, *cached]}.values())


def point_fields(settings: SamplingSettings) -> dict[str, Any]:
    """What tells the points of one sweep apart, as plain values."""
    return {"num_steps": settings.num_steps, **settings.cache_fields()}


def shared_fields(settings: SamplingSettings) -> dict[str, Any]:
    """What the points of one sweep have in common, as plain values: guidance, seed, labels and the like."""
    return {name: value for name, value in settings.sampling_fields().items() if name not in point_fields(settings)}


def point_key(settings: SamplingSettings) -> str:
    return json.dumps(point_fields(settings), sort_keys=True)


def series_name(settings: CacheSettings) -> str:
    """'Taylor per module': the points that one colour and marker stand for."""
    if settings.cache == "none":
        return "plain"
    return "Δ-DiT" if settings.cache == "delta-dit" else f"{settings.cache.capitalize()} per {settings.granularity}"


def short_name(settings: SamplingSettings) -> str:
    """What is written beside a point of a series: its interval and order, '4/2'; of plain sampling its steps."""
    if settings.cache == "none":
        return str(settings.num_steps)
    words = str(settings.resolved_interval)
    if settings.cache == "delta-dit":
        return words if settings.gate is None else f"{words}, b {settings.gate}"
    if settings.cache != "reuse":
        words += f"/{settings.resolved_order}"
    return f"{words} ≤{settings.max_error:g}" if settings.max_error else words


def long_name(settings: SamplingSettings) -> str:
    """'Taylor per module, interval 4, order 2, 50 steps', for tables and sentences."""
    if settings.cache == "none":
        return f"{settings.num_steps} plain steps"
    gate = f", gate {settings.gate}" if settings.gate is not None else ""
    return f"{settings.describe_cache()}{gate}, {settings.num_steps} steps"
