"""The settings of feature caching, as plain values for command lines and records, with all their checks.

`check_cache` checks the settings themselves, `check_depth` with a model's depth, `check_run` with a number of steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from haste.errors import UserError, shorten
from haste.validation import check_numbers, check_types

# Of Δ-DiT, as published for PixArt-α: 12 of 20 steps, 21 of 28 blocks.
GATE_SHARE = 0.6
CACHED_SHARE = 0.75

Settings = TypeVar("Settings", bound="CacheConfig")


@dataclass(kw_only=True)
class CacheConfig:
    """Which steps are computed in full, and how the others are forecast.

    `CacheConfig(cache="taylor")` alone is TaylorSeer as published for DiT (arXiv 2503.06923): every module's output,
    one full step in four, order 4.

    Raises:
        UserError: values out of bounds, or that contradict each other; names the flag of the command line.
    """

    cache: Literal["none", "reuse", "taylor", "newton", "hermite", "delta-dit"] = "none"
    """Forecaster. none: compute every step in full. reuse: repeat the last full step. taylor: TaylorSeer. newton:
    polynomial through the last full steps at their actual times. hermite: HiCache. delta-dit: skip some blocks."""
    granularity: Literal["module", "block", "model", "output"] = "module"
    """What is cached and forecast: the output of each attention and MLP (module), the sum of what the blocks add
    (block), the tokens after the last block (model), or the model's output (output), which works for any model and is
    what is cached where images are made in parts, as by xAR."""
    interval: int | None = None
    """Steps from one full step to the next. [default: 4; with --error-threshold at most 10; delta-dit: 2]"""
    order: int | None = None
    """Order of the forecast, from the last order + 1 full steps. [default: 4; reuse and delta-dit: 0]"""
    first_enhance: int | None = None
    """Number of full steps at the beginning. From 3 on taylor and hermite form differences from the last two of them
    on, as published. [default: 2; delta-dit: 1]"""
    spacing: Literal["interval", "even"] = "interval"
    """interval: one full step every --interval after those at the beginning, as in TaylorSeer. even: full steps at even
    distances of at most --interval from the first step to the last but one, in place of --first-enhance, and where
    images are made in parts, without that flag, in each part."""
    full_steps: str = ""
    """Indices of the full steps, such as 0,1,2,5,9. Replaces --interval."""
    error_threshold: float = 0.0
    """Choose the full steps by this limit on the measured relative error of a forecast, at most --interval apart. 0:
    off."""
    gate: int | None = None
    """delta-dit: number of remaining steps at which it changes from skipping the rear blocks to skipping the front
    blocks. [default: 0.6 of --num-steps]"""
    cached_blocks: int | None = None
    """delta-dit: number of blocks to skip. [default: three in four]"""

    def __post_init__(self) -> None:
        check_types(self)
        if type(self) is CacheConfig:  # a subclass is checked with all its flags, by its own check()
            self.check_cache()

    # ---- what the settings mean ----

    @property
    def full_step_list(self) -> list[int]:
        """--full-steps as numbers; empty if it is not given."""
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
        default = 0 if self.cache in ("reuse", "delta-dit") else 4
        return min(default, len(self.full_step_list) - 1) if self.full_steps else default

    def resolved_gate(self, num_steps: int) -> int:
        return round(GATE_SHARE * num_steps) if self.gate is None else self.gate

    def resolved_cached_blocks(self, depth: int) -> int:
        return round(CACHED_SHARE * depth) if self.cached_blocks is None else self.cached_blocks

    def fitted(self, num_steps: int, names: Iterable[str]) -> CacheConfig:
        """The same settings, of which interval and order, if named, shrink to what a run of num_steps steps allows.

        The interval shrinks to a quarter of the run, at least 2.
        """
        chosen = self
        if "interval" in names and chosen.interval is not None:
            longest = max(num_steps // 4, min(2, num_steps // 2), 1)
            chosen = replace(chosen, interval=min(chosen.interval, longest))
        full = chosen.planned_full_steps(num_steps)
        if "order" in names and chosen.order is not None and full is not None:
            chosen = replace(chosen, order=min(chosen.order, max(0, len(full) - 1)))
        return chosen

    def in_parts(self: Settings) -> Settings:
        """The same settings for images that are made in parts, as xAR's: the output is cached, and full steps are at
        even distances in each part, unless --first-enhance or --full-steps says where.

        Raises:
            UserError: settings that have no meaning there.
        """
        if self.cache == "none":
            return self
        for flag, given, instead in (
            ("cache", self.cache == "delta-dit" and self.cache, "reuse, taylor, newton or hermite"),
            ("granularity", self.granularity in ("block", "model") and self.granularity, "output"),
            ("error-threshold", self.error_threshold, "left out"),
        ):
            if given:
                raise UserError(f"--{flag} must be {instead} for a model whose images are made in parts, got {given}")
        even = not self.full_steps and self.first_enhance is None
        return replace(self, granularity="output", spacing="even" if even else "interval")

    def planned_full_steps(self, num_steps: int) -> list[int] | None:
        """The full steps of an undisturbed run, from 0; None if they depend on measured errors.

        TaylorSeer's schedule: the first steps, and from the last of them on one every `interval`. Of 50 steps intervals
        3, 4, 5 and 6 leave 18, 14, 11 and 10 full ones, as published. For an even spacing see `even_steps`.
        """
        if self.full_steps:
            return self.full_step_list
        if self.error_threshold:
            return None
        first, interval = self.resolved_first_enhance, self.resolved_interval
        if self.spacing == "even":
            return even_steps(num_steps, interval)
        return [*range(min(first, num_steps)), *range(first - 1 + interval, num_steps, interval)]

    def cache_fields(self) -> dict[str, Any]:
        """Exactly the settings that decide the images, resolved, for records and names."""
        fields: dict[str, Any] = {"cache": self.cache}
        if self.cache == "none":
            return fields
        if self.full_steps:
            fields["full_steps"] = self.full_steps
        elif self.spacing == "even" and self.cache != "delta-dit" and not self.error_threshold:
            fields |= {"interval": self.resolved_interval, "spacing": self.spacing}
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
        when = f"even {when}" if self.spacing == "even" else when
        if self.cache == "delta-dit":
            return f"Δ-DiT, {when}"
        if self.error_threshold:
            when = f"error {self.error_threshold:g}, {when}"
        described = f"{self.cache.capitalize()} per {self.granularity}, {when}"
        return described if self.cache == "reuse" else f"{described}, order {self.resolved_order}"

    # ---- checks ----

    def check_cache(self) -> None:
        """Check all numbers, also a subclass's, and that no flag contradicts another."""
        check_numbers(self)
        steps = self.full_step_list
        if steps and (sorted(set(steps)) != steps or steps[0] != 0):
            raise UserError(f"--full-steps must be increasing step numbers that begin with 0, got {self.full_steps}")
        used = self.cache_fields()
        for field in fields(CacheConfig):
            value = getattr(self, field.name)
            if field.name not in used and value != field.default:
                flag, why = field.name.replace("_", "-"), self._why_unused(field.name)
                raise UserError(f"--{flag} must be left out {why}, which does not use it, got {value}")
        if self.cache == "reuse" and self.resolved_order != 0:
            raise UserError(f"--order must be 0 for --cache reuse, got {self.order}")

    def _why_unused(self, name: str) -> str:
        if self.cache == "none":
            return "with --cache none"
        if name in ("interval", "first_enhance", "error_threshold", "spacing") and self.full_steps:
            return "beside --full-steps"
        if name == "spacing" and self.error_threshold:
            return "beside --error-threshold"
        if name == "first_enhance" and self.spacing == "even":
            return "beside --spacing even"
        return f"with --cache {self.cache}"

    def check_depth(self, depth: int) -> None:
        """Check the settings for a model of `depth` blocks."""
        count = self.resolved_cached_blocks(depth)
        if self.cache == "delta-dit" and not 1 <= count <= depth:
            raise UserError(f"--cached-blocks must be from 1 to the model's {depth} blocks, got {count}")

    def check_run(self, num_steps: int) -> None:
        """Check the given settings for a run of `num_steps` steps; defaults have effect as far as the run allows."""
        steps = self.full_step_list
        if steps and steps[-1] >= num_steps:
            raise UserError(f"--full-steps must be numbers from 0 to {num_steps - 1} for {num_steps} steps, "
                            f"got {steps[-1]}")  # fmt: skip
        counts = {} if steps else {"interval": self.interval, "first-enhance": self.first_enhance}
        if self.error_threshold:
            counts.pop("interval", None)  # the most that it may become
        for flag, count in counts.items():
            if count is not None and count > num_steps:
                raise UserError(f"--{flag} must be at most the number of steps, {num_steps}, got {count}")
        gate = self.resolved_gate(num_steps)
        if self.cache == "delta-dit" and not 0 <= gate <= num_steps:
            raise UserError(f"--gate must be from 0 to the number of steps, {num_steps}, got {gate}")
        full = self.planned_full_steps(num_steps)
        if full is not None and self.order is not None and self.order >= max(1, len(full)):
            raise UserError(f"--order must be at most {len(full) - 1}, as {len(full)} of {num_steps} steps are full, "
                            f"got {self.order}")  # fmt: skip


def even_steps(num_steps: int, interval: int) -> list[int]:
    """Steps at even distances of at most `interval` from the first step of a run to the last but one; 1: all steps.

    The last step is forecast over a distance of one. Of as many full steps these gave the images closest to the full
    run's, most of all where the last steps are the longest (docs/benchmarks.md).
    """
    last = num_steps - 2
    if interval == 1 or last < 1:
        return list(range(num_steps if interval == 1 else 1))
    gaps = -(-last // interval)
    return [(2 * index * last + gaps) // (2 * gaps) for index in range(gaps + 1)]


# What enable_cache(model) means, and `haste sample --fast` for the ODE: by the measurements and the rule in
# docs/benchmarks.md.
FAST = CacheConfig(cache="newton", granularity="model", interval=6, spacing="even", order=2)

LEAST_STEPS = 8  # below, most steps of FAST would be full


def fast_config(num_steps: int, noisy: bool, flag: str = "num-steps") -> CacheConfig:
    """What `haste sample --fast` means.

    Args:
        num_steps: of the sampler. Below 24 the interval shrinks.
        noisy: the sampler adds noise at every step, as the SDE's does. A high order would multiply it.
        flag: what says how many steps there are, for messages.

    Raises:
        UserError: a run too short to forecast any of it.
    """
    if num_steps < LEAST_STEPS:
        raise UserError(f"--{flag} must be at least {LEAST_STEPS} for --fast, which forecasts most of many steps, "
                        f"got {num_steps}; or go without --fast")  # fmt: skip
    chosen = FAST.fitted(num_steps, ("interval", "order"))
    return replace(chosen, order=1) if noisy else chosen


def chosen_config(config: CacheConfig | None, settings: Mapping[str, Any]) -> tuple[CacheConfig, frozenset[str]]:
    """What the arguments of enable_cache mean.

    Args:
        config: None for FAST, or with "cache" among the settings for that cache's own defaults.
        settings: fields of CacheConfig that change it.

    Returns:
        The config, and the names of those of its settings that nobody chose, for `CacheConfig.fitted`.

    Raises:
        UserError: contradicting settings.
        TypeError: a setting that CacheConfig does not have.
    """
    if config is not None or "cache" in settings:
        return replace(config or CacheConfig(), **settings), frozenset()
    replaced: dict[str, Any] = {"interval": None} if settings.get("full_steps") else {}
    if any(settings.get(name) for name in ("full_steps", "error_threshold", "first_enhance")):
        replaced["spacing"] = "interval"
    return replace(FAST, **{**replaced, **settings}), frozenset({"interval", "order"} - {*settings, *replaced})
