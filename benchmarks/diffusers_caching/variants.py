"""The ways to sample a case: every step in full, fewer steps, the caches of diffusers and cache-dit, and haste's.

All caches have the same full steps and forecast of first order, from float32. Each variant has a copy of the model for
itself, so that no hook of one is met by another.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import FULL_STEPS, NUM_STEPS, Case
from torch import Tensor, nn

ORDER = 1
INTERVAL = 6
CACHE_DIT = "cache-dit, F1B0 with TaylorSeer"


@dataclass
class Sampler:
    """One variant around its own copy of a case's model.

    Args:
        model: what the loop calls.
        transformer: that copy.
        begin: called before every run: what a variant needs to forget the last image.
        note: what is known of it before it runs, such as that nothing is hooked.
    """

    case: Case
    transformer: nn.Module
    model: Callable[..., Any]
    num_steps: int = NUM_STEPS
    begin: Callable[[], object] = lambda: None
    note: str = ""

    def __call__(self, after_step: Callable[[], object] = int) -> Tensor:
        self.begin()
        return self.case.sample(self.model, self.num_steps, after_step)


@dataclass(frozen=True)
class Variant:
    """make(case) -> a Sampler. ours: one of haste's. absent: the package that is not installed here."""

    name: str
    make: Callable[[Case], Sampler]
    ours: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    absent: str = ""


# ---- without a cache ----


def uncached(case: Case) -> Sampler:
    return Sampler(case, case.model, case.model)


def fewer_steps(case: Case) -> Sampler:
    return Sampler(case, case.model, case.model, len(FULL_STEPS))


# ---- diffusers ----


def diffusers_default(case: Case) -> Sampler:
    return diffusers_sampler(case)


def diffusers_lite(case: Case) -> Sampler:
    return diffusers_sampler(case, use_lite_mode=True)


def diffusers_modules(case: Case) -> Sampler:
    skipped = list(case.skipped) or None
    return diffusers_sampler(case, cache_identifiers=list(case.modules), skip_predict_identifiers=skipped)


def diffusers_sampler(case: Case, **settings: Any) -> Sampler:
    """diffusers' TaylorSeer; by hand on a class that lacks enable_cache."""
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import HookRegistry, apply_taylorseer_cache
    from diffusers.models.cache_utils import CacheMixin

    config = TaylorSeerCacheConfig(
        cache_interval=INTERVAL, disable_cache_before_step=FULL_STEPS.index(2) + 1, max_order=ORDER,
        taylor_factors_dtype=torch.float32, **settings,
    )  # fmt: skip
    model = copy.deepcopy(case.model)
    notes = []
    if hasattr(model, "enable_cache"):
        model.enable_cache(config)
    else:
        apply_taylorseer_cache(model, config)
        notes.append("no enable_cache, applied by hand")
    hooked = hooked_modules(model)
    if not hooked:
        notes.append("hooks nothing")
    elif config.use_lite_mode and "proj_out" not in hooked:
        notes.append("blocks give 0, as the class has no module named proj_out")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()

    def call(**inputs: Any) -> Any:
        with CacheMixin.cache_context(model, "cond"):  # as pipelines call it; on a class that lacks it too
            return model(**inputs)

    return Sampler(case, model, call, begin=lambda: registry.reset_stateful_hooks(recurse=True), note="; ".join(notes))


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of the modules that have a cache's hook."""
    registries = {name: getattr(module, "_diffusers_hook", None) for name, module in model.named_modules()}
    return [name for name, registry in registries.items() if registry is not None and registry.hooks]


# ---- cache-dit ----


def cache_dit(case: Case) -> Sampler:
    """Its first block in full at every step, the residual of the others by TaylorSeer, at the same full steps."""
    import cache_dit
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

    config = DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=1e9,
        enable_separate_cfg=False, num_inference_steps=NUM_STEPS,
        steps_computation_mask=[int(step in FULL_STEPS) for step in range(NUM_STEPS)],
    )  # fmt: skip
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=ORDER)
    model = copy.deepcopy(case.model)
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    return Sampler(case, model, model, begin=lambda: cache_dit.refresh_context(model, num_inference_steps=NUM_STEPS))


# ---- haste ----


def haste_cache(cache: str, granularity: str) -> Callable[[Case], Sampler]:
    def make(case: Case) -> Sampler:
        import haste

        steps = ",".join(map(str, FULL_STEPS))
        model = copy.deepcopy(case.model)
        settings = {"cache": cache, "granularity": granularity, "order": ORDER, "full_steps": steps}
        return Sampler(case, model, haste.enable_cache(model, times=case.times(), **settings))

    return make


# ---- all of them ----

UNCACHED, FEWER = VARIANTS = [
    Variant("uncached", uncached),
    Variant(f"uncached, {len(FULL_STEPS)} steps", fewer_steps),
]
VARIANTS = [
    *VARIANTS,
    Variant("diffusers TaylorSeer, default", diffusers_default),
    Variant("diffusers TaylorSeer, lite", diffusers_lite),
    Variant("diffusers TaylorSeer, per module", diffusers_modules),
    Variant(CACHE_DIT, cache_dit, absent="" if importlib.util.find_spec("cache_dit") else "cache-dit"),
    *[
        Variant(f"haste {granularity}, {cache.capitalize()}", haste_cache(cache, granularity), ours=True)
        for granularity in ("module", "block", "model", "output")
        for cache in ("taylor", "newton")
    ],
]
