"""The settings of feature caching, as plain values that a command line takes and a record keeps."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from haste.errors import UserError, shorten
from haste.validation import check_numbers


@dataclass(kw_only=True)
class CacheConfig:
    """Which steps are computed in full, and what stands in for the others.

    `--cache taylor` alone is TaylorSeer as published for DiT (arXiv 2503.06923): every module's output, one full step
    in four, order 4.
    """

    cache: Literal["none", "reuse", "taylor", "newton", "hermite", "delta-dit"] = "none"
    """none: every step in full. Others forecast most steps from the last full ones: reuse repeats the last, taylor is
    TaylorSeer, newton interpolates over the true times, hermite is HiCache. delta-dit skips one part of the blocks."""
    granularity: Literal["module", "block", "model"] = "module"
    """What is forecast: the output of every attention and MLP, what every block adds, or the tokens after the last."""
    interval: int | None = None
    """One full step every so many. [default: 4; with --error-threshold at most every 10; delta-dit: 2]"""
    order: int | None = None
    """Order of the forecast; order + 1 full steps are kept. [default: 4; reuse and delta-dit: 0]"""
    first_enhance: int | None = None
    """So many steps at the beginning are full. [default: 2; delta-dit: 1]"""
    full_steps: str = ""
    """The full steps by their numbers, such as 0,1,2,5,9, in place of --interval."""
    error_threshold: float = 0.0
    """Full steps as far apart as this relative error of a forecast allows, at most --interval. 0: evenly apart."""
    gate: int | None = None
    """delta-dit: the rear blocks are skipped while more steps than this remain, then the front ones. [default: 0.6 of
    --num-steps]"""
    cached_blocks: int | None = None
    """delta-dit: so many blocks are skipped. [default: three in four]"""

    @property
    def full_step_list(self) -> list[int]:
        """--full-steps as numbers; UserError if it is no list of them."""
        if not self.full_steps:
            return []
        if not (isinstance(self.full_steps, str) and re.fullmatch(r"[0-9]{1,5}(,[0-9]{1,5})*", self.full_steps)):
            given = shorten(repr(self.full_steps))
            raise UserError(f"--full-steps must be step numbers such as '0,1,2,5,9', got {given}")
        return [int(word) for word in self.full_steps.split(",")]

    @property
    def resolved_interval(self) -> int:
        if self.interval is not None:
            return self.interval
        return 2 if self.cache == "delta-dit" else 10 if self.error_threshold else 4

    @property
    def resolved_first_enhance(self) -> int:
        if self.first_enhance is not None:
            return self.first_enhance
        return 1 if self.cache == "delta-dit" else 2

    @property
    def resolved_order(self) -> int:
        if self.order is not None:
            return self.order
        return 0 if self.cache in ("reuse", "delta-dit") else 4

    def cache_fields(self) -> dict[str, Any]:
        """Exactly the settings that decide the images, resolved, for records and names."""
        fields: dict[str, Any] = {"cache": self.cache}
        if self.cache == "none":
            return fields
        if self.full_steps:
            fields["full_steps"] = self.full_steps
        else:
            fields |= {"interval": self.resolved_interval, "first_enhance": self.resolved_first_enhance}
        if self.cache == "delta-dit":
            return {**fields, "gate": self.gate, "cached_blocks": self.cached_blocks}
        if self.error_threshold:
            fields["error_threshold"] = self.error_threshold
        return {**fields, "order": self.resolved_order, "granularity": self.granularity}

    def describe_cache(self) -> str:
        """'Taylor per module, interval 4, order 4', for titles; empty without a cache."""
        if self.cache == "none":
            return ""
        when = f"full steps {self.full_steps}" if self.full_steps else f"interval {self.resolved_interval}"
        if self.cache == "delta-dit":
            return f"Δ-DiT, {when}"
        if self.error_threshold:
            when = f"error {self.error_threshold:g}, {when}"
        name = self.cache.capitalize()
        if self.cache == "reuse":
            return f"{name} per {self.granularity}, {when}"
        return f"{name} per {self.granularity}, {when}, order {self.resolved_order}"

    def check_cache(self) -> None:
        """UserError for values out of bounds, also a subclass's, and for flags that contradict each other.

        What the number of steps allows is checked with each run.
        """
        for name in ("cache", "granularity"):
            value, known = getattr(self, name), get_args(get_type_hints(CacheConfig)[name])
            if value not in known:
                raise UserError(f"--{name} must be {', '.join(known[:-1])} or {known[-1]}, got {shorten(value)}")
        check_numbers(self)
        _ = self.full_step_list  # raises for what is no list
        defaults = CacheConfig()
        unused = [name for name in asdict(defaults) if name not in (*self.cache_fields(), "cache")]
        for name in unused:
            value = getattr(self, name)
            if value != getattr(defaults, name):
                flag, why = name.replace("_", "-"), self._why_unused(name)
                raise UserError(f"--{flag} is {value}, which nothing uses {why}")
        if self.cache == "reuse" and self.resolved_order != 0:
            raise UserError(f"--order is {self.order}; it must be 0 for --cache reuse")

    def _why_unused(self, name: str) -> str:
        if self.cache == "none":
            return "without --cache"
        if name in ("interval", "first_enhance", "error_threshold") and self.full_steps:
            return "beside --full-steps"
        return f"with --cache {self.cache}"


# What wrap(model) means, and `haste sample --fast` for the ODE.
FAST = CacheConfig(cache="newton", granularity="model", interval=6, order=2)

LEAST_STEPS = 8  # below, most steps of FAST would be full


def fast_config(num_steps: int, noisy: bool) -> CacheConfig:
    """What `haste sample --fast` means; UserError for a run too short to leave anything out.

    noisy: the sampler adds noise at every step, as the SDE's does. A high order would multiply it.
    """
    if num_steps < LEAST_STEPS:
        raise UserError(f"--fast leaves out most of many steps, and --num-steps is {num_steps}; it must be at least "
                        f"{LEAST_STEPS}, or go without --fast")  # fmt: skip
    return replace(FAST, order=1) if noisy else FAST
