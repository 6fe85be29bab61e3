"""The ways to sample one batch of images: every step in full, fewer steps, and every cache; each in every launching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from time import perf_counter, process_time

import torch
from cases import Case
from eager import EagerTaylorSeer, full_steps
from haste import cuda_graphs
from haste.caching import CacheConfig, make_cache
from haste.models import ModelOutput, build_model, get_family
from haste.samplers import initial_noise, sample
from torch import Tensor, nn

# How the model's work reaches the processor: call by call, compiled, or as CUDA graphs that are replayed.
LAUNCHED, COMPILED, GRAPHS = "", "torch.compile", "CUDA graphs"


@dataclass(frozen=True)
class Variant:
    """cache: of haste.caching. eager: the baseline's cache in its place."""

    name: str
    cache: str | None = None
    granularity: str = "module"
    eager: bool = False
    fewer_steps: bool = False

    @property
    def cached(self) -> bool:
        return self.eager or self.cache is not None

    def settings(self, case: Case) -> CacheConfig:
        if self.cache == "delta-dit":
            return CacheConfig(cache="delta-dit", interval=case.interval)
        return CacheConfig(cache="taylor", granularity=self.granularity, interval=case.interval, order=case.order)


UNCACHED, FEWER, EAGER, MODULE, BLOCK, MODEL, OUTPUT, DELTA = VARIANTS = (
    Variant("uncached"),
    Variant("uncached, fewer steps", fewer_steps=True),
    Variant("eager TaylorSeer", eager=True),
    Variant("TaylorSeer per module", "taylor", "module"),
    Variant("TaylorSeer per block", "taylor", "block"),
    Variant("TaylorSeer whole model", "taylor", "model"),
    Variant("TaylorSeer output", "taylor", "output"),
    Variant("Δ-DiT", "delta-dit"),
)


def make_model(case: Case) -> nn.Module:
    """Weights at which every layer is heard, as in a trained model: a new one's gates are shut."""
    torch.manual_seed(0)
    with torch.device(case.device):
        model = build_model(case.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 1 / sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
                parameter.normal_(std=scale)
    return model.to(getattr(torch, case.dtype)).eval().requires_grad_(False)


def clock_of(case: Case) -> Callable[[], float]:
    """What counts the seconds on the CPU."""
    return process_time if case.processor_time else perf_counter


class Stopwatch:
    """A model that is asked for its steps, with the time of every call; a GPU does not wait for it."""

    training = False

    def __init__(self, model: Callable[..., ModelOutput], dtype: torch.dtype, case: Case) -> None:
        self.model = model
        self.dtype = dtype
        self.device = case.device
        self.prediction = get_family(case.config).prediction  # by which the sampler goes
        self.clock = clock_of(case)

    def start(self, calls: list) -> None:
        if hasattr(self.model, "start"):
            self.model.start(calls)
        self.calls: list[tuple[bool, float, float]] = []

    def now(self):
        if self.device == "cpu":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        skipped, begin = self.num_forecast, self.now()
        output = self.model(x, t, y)
        self.calls.append((self.num_forecast == skipped, begin, self.now()))
        return output

    @property
    def num_forecast(self) -> int:
        return getattr(self.model, "num_forecast", 0)

    def seconds(self, full: bool) -> list[float]:
        """Of the full or of the skipped calls since `start`; on a GPU only once it has been waited for."""
        if self.device == "cpu":
            return [end - begin for kind, begin, end in self.calls if kind == full]
        return [begin.elapsed_time(end) / 1e3 for kind, begin, end in self.calls if kind == full]


class GraphedModel:
    """A model without a cache as one CUDA graph: what a cache in CUDA graphs is compared with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> ModelOutput:
        if not self.inputs:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.replay, self.output = cuda_graphs.capture(self.model, self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()
        return self.output


def make_condition(case: Case) -> Tensor:
    """Classes (B,), or random features of texts (B, tokens, width)."""
    text, classes = case.layout.condition_shape, case.layout.num_classes
    if text is None:
        return torch.arange(case.batch, device=case.device) % classes
    return torch.randn(case.batch, *text, generator=torch.Generator().manual_seed(2)).to(case.device)


class Run:
    """One way to sample the case's batch; the noise, and the classes or text features, are the same every time."""

    def __init__(self, variant: Variant, launch: str, case: Case, model: nn.Module) -> None:
        self.variant = variant
        self.launch = launch
        self.case = case
        self.num_steps = len(full_steps(case.num_steps, case.interval)) if variant.fewer_steps else case.num_steps
        shape = (case.batch, *case.layout.input_shape)
        self.noise = initial_noise(shape, torch.Generator().manual_seed(1), device=case.device)
        self.condition = make_condition(case)
        self.stopwatch = Stopwatch(self.wrapped(model), model.dtype, case)

    @property
    def name(self) -> str:
        return f"{self.variant.name}, {self.launch}" if self.launch else self.variant.name

    def wrapped(self, model: nn.Module) -> Callable[..., ModelOutput]:
        """The model as the variant calls it."""
        case, variant = self.case, self.variant
        if variant.eager:
            return EagerTaylorSeer(model, case.interval, case.order)
        cached = make_cache(model, variant.settings(case)) if variant.cached else None
        if self.launch == GRAPHS:
            return GraphedModel(model) if cached is None else cached.capture()
        if self.launch == COMPILED:
            return torch.compile(model, fullgraph=True, dynamic=False) if cached is None else cached.compile()
        return model if cached is None else cached

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """The images (B, C, S, S), or what fewer steps make of them."""
        guided = {"cfg_scale": self.case.cfg_scale, "null": self.case.layout.num_classes, "guided_channels": 3}
        guided = guided if self.case.cfg_scale != 1 else {}
        return sample(self.stopwatch, self.noise, self.condition, num_steps=num_steps or self.num_steps, **guided)

    @property
    def cache_bytes(self) -> int:
        return getattr(self.stopwatch.model, "cache_bytes", 0)


def make_runs(case: Case, launches: Sequence[str]) -> list[Run]:
    """All of them around one model; the baseline is launched as it is published."""
    model = make_model(case)
    pairs = [(v, launch) for launch in launches for v in VARIANTS if launch == LAUNCHED or not v.eager]
    return [Run(variant, launch, case, model) for variant, launch in pairs]
