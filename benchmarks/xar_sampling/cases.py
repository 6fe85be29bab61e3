"""What is measured: the model's geometry, the batch, and the ways to sample it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from haste.caching import CacheConfig, make_cache
from haste.errors import UserError
from haste.models import XAR, build_model, find_size
from haste.models.xar_costs import cache_bytes, count_flops, modulation_flops, network_flops
from haste.models.xar_sampling import guidance_scales, sample_parts
from haste.samplers import Solver
from published import PublishedSampler
from torch import Tensor

DTYPES = ("float32", "bfloat16")
CHANNELS, GRID, CLASSES = 16, 16, 1000  # of MAR's KL-16 at 256 pixels, and of ImageNet

PUBLISHED = "as published"
EXACT = "haste"


@dataclass(frozen=True)
class Case:
    """One table of the report. stagger: steps between cells where they are staggered."""

    model: str
    batch: int
    dtype: str
    num_steps: int
    cfg_scale: float
    interval: int
    order: int
    stagger: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def config(self) -> dict[str, Any]:
        family, size = find_size(self.model)
        depth = size["depth"]
        return {
            "family": family.name, "width": size["hidden_size"], "heads": size["num_heads"], "channels": CHANNELS,
            "encoder_depth": depth - depth // 2, "decoder_depth": depth // 2, "grid": GRID, "num_classes": CLASSES,
        }  # fmt: skip


def make_case(
    model: str, batch: int, dtype: str, num_steps: int, cfg_scale: float, interval: int, order: int, stagger: int
) -> Case:
    """UserError, in one sentence, for what cannot be measured."""
    family, _ = find_size(model)
    if family.name != "xar":
        raise UserError(f"--model must be a size of xAR, got {model!r}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch-size", batch), ("interval", interval), ("stagger", stagger)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if num_steps < 2:
        raise UserError(f"--num-steps must be at least 2, got {num_steps}")
    if cfg_scale <= 1:
        raise UserError(f"--cfg-scale must be above 1, got {cfg_scale:g}")
    return Case(model, batch, dtype, num_steps, cfg_scale, interval, order, stagger)


def make_model(case: Case) -> XAR:
    """Random weights, at which every layer, the class and the time are heard."""
    torch.manual_seed(0)
    model = build_model(case.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
        for norm in (model.z_proj_ln, model.encoder_norm, model.decoder_norm):
            norm.weight.fill_(1.0)
        model.class_emb.weight.normal_(std=0.5)
    return model.to(getattr(torch, case.dtype)).eval().requires_grad_(False)


class Run:
    """One way to sample the case's batch; noise, labels and step noise are the same every time.

    rounds, evaluations: one after the other; of the network. flops: for one image. cache_bytes: keys, values, features.
    """

    def __init__(
        self, name: str, case: Case, model: XAR, *, stagger: int | None = None, forecast: bool = False
    ) -> None:
        self.name, self.case, self.model = name, case, model
        self.stagger, self.forecast = stagger, forecast
        generator = torch.Generator().manual_seed(1)
        entities, values = model.entities, model.z_proj.in_features
        self.noise = torch.randn(case.batch, entities.total, values, generator=generator)
        kicks = [(k, step) for k in range(entities.count) for step in range(case.num_steps - 1)]
        self.step_noise = [
            torch.randn(case.batch, entities.sizes[k], values, generator=generator, dtype=torch.float64)
            for k, _ in kicks
        ]
        self.labels = torch.arange(case.batch) * 7 % CLASSES
        self.evaluations = self.flops = self.cache_bytes = 0

    def solver(self, num_steps: int | None = None, step_noise: Iterator[Tensor] | None = None) -> Solver:
        return Solver(
            sampler="euler-maruyama", num_steps=num_steps or self.case.num_steps, cfg_scale=self.case.cfg_scale,
            null=CLASSES, stagger=self.stagger, step_noise=step_noise,
        )  # fmt: skip

    def cache(self) -> Any:
        if not self.forecast:
            return None
        config = CacheConfig(cache="taylor", granularity="output", interval=self.case.interval, order=self.case.order)
        return make_cache(self.model, config)

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """The images as sequences (B, N, values)."""
        cache = self.cache()
        images = sample_parts(self.model, self.noise, self.labels, self.solver(num_steps, iter(self.step_noise)), cache)
        return self.model.entities.split(images)

    def count(self) -> dict[str, Any]:
        """What does not change from run to run."""
        model, solve, cache = self.model, self.solver(), self.cache()
        counted = count_flops(model, solve, cache=cache)
        return {
            "evaluations": counted.evaluations,
            "rounds": len(solve.plan(guidance_scales(model.entities.count))),
            "flops": counted.flops,
            "cache_bytes": cache_bytes(model, self.case.batch, guided=True),
        }


class PublishedRun(Run):
    """The baseline."""

    def __call__(self, num_steps: int | None = None) -> Tensor:
        self.sampler = PublishedSampler(self.model)
        noise = self.noise.split(self.model.entities.sizes, dim=1)
        steps = num_steps or self.case.num_steps
        return self.sampler(noise, iter(self.step_noise), self.labels, steps, self.case.cfg_scale)

    def count(self) -> dict[str, Any]:
        return published_counts(self.model, self.case)


def published_counts(model: XAR, case: Case) -> dict[str, Any]:
    """Both halves of a cell in every evaluation, and of the cell before it in a cell's first one."""
    cell, count, steps = model.entities.causal, model.entities.count, case.num_steps
    flops = 0
    for k in range(count):
        own = 2 * (network_flops(model, k, (cell,)) + modulation_flops(model))
        flops += own * (steps + (k > 0))  # the cell before it goes along once; a mask saves no product
    kept = cache_bytes(model, case.batch, guided=True) * (count - 1) // count  # without the last cell's
    return {"evaluations": count * steps, "rounds": count * steps, "flops": flops, "cache_bytes": kept}


def make_runs(case: Case) -> list[Run]:
    """All of them around one model."""
    model = make_model(case)
    make: Callable[..., Run] = lambda name, **settings: Run(name, case, model, **settings)  # noqa: E731
    return [
        PublishedRun(PUBLISHED, case, model),
        make(EXACT),
        make(f"{EXACT}, forecast", forecast=True),
        make(f"{EXACT}, staggered", stagger=case.stagger),
        make(f"{EXACT}, staggered, forecast", stagger=case.stagger, forecast=True),
    ]
