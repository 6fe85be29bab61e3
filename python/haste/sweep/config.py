"""The points of a sweep: every combination of the requested settings, and uncached sampling beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Fixed, Suppress

from haste.caching.config import CacheConfig
from haste.errors import UserError
from haste.evaluation.config import check_classifier_dir
from haste.generation.config import SamplingConfig, list_labels
from haste.generation.prompts import list_prompts
from haste.validation import check_numbers


@dataclass(frozen=True)
class Grid:
    """Values of each setting, of which a point has one each. None is the default of the setting."""

    caches: Sequence[str]
    granularities: Sequence[str] = ("module",)
    intervals: Sequence[int | None] = (None,)
    orders: Sequence[int | None] = (None,)
    spacings: Sequence[str] = ("interval",)
    error_thresholds: Sequence[float] = (0.0,)
    gates: Sequence[int | None] = (None,)
    steps: Sequence[int] = (50,)

    def settings(self, base: SamplingConfig) -> Iterator[SamplingConfig]:
        """Yield every combination, the other settings from `base`. reuse has no order; delta-dit has gates alone; an
        error threshold has no spacing."""
        for steps, cache, interval in product(self.steps, self.caches, self.intervals):
            own: dict[str, Sequence[Any]]
            if cache == "delta-dit":
                own = {"gate": self.gates}
            else:
                orders = self.orders if cache != "reuse" else (None,)
                own = {
                    "granularity": self.granularities, "spacing": self.spacings,
                    "error_threshold": self.error_thresholds, "order": orders,
                }  # fmt: skip
            for values in product(*own.values()):
                chosen = dict(zip(own, values, strict=True))
                if chosen.get("error_threshold"):
                    chosen["spacing"] = "interval"
                yield replace(base, num_steps=steps, cache=cache, interval=interval, **chosen)  # type: ignore[arg-type]


def plan(base: SamplingConfig, grids: Sequence[Grid], uncached_steps: Sequence[int]) -> list[SamplingConfig]:
    """List the points of a sweep, each once: the uncached runs from the longest on, then the cached ones in order.

    The numbers of steps of the grids are among the uncached runs: cached runs are compared with them.
    """
    counts = sorted({*uncached_steps, *(steps for grid in grids for steps in grid.steps)}, reverse=True)
    uncached = [replace(base, num_steps=count) for count in counts]
    cached = [settings for grid in grids for settings in grid.settings(base)]
    return list({point_key(settings): settings for settings in [*uncached, *cached]}.values())


def point_fields(settings: SamplingConfig) -> dict[str, Any]:
    """The settings in which the points of a sweep differ, as plain values."""
    in_parts = {"cell_steps": settings.cell_steps, "stagger": settings.stagger}
    used = {name: value for name, value in in_parts.items() if value not in ("", None)}
    return {"num_steps": settings.num_steps, **used, **settings.cache_fields()}


def shared_fields(settings: SamplingConfig) -> dict[str, Any]:
    """The settings that the points of a sweep share, as plain values: guidance, seed, labels and the like."""
    return {name: value for name, value in settings.sampling_fields().items() if name not in point_fields(settings)}


def point_key(settings: SamplingConfig) -> str:
    """`point_fields` as text."""
    return json.dumps(point_fields(settings), sort_keys=True)


def series_name(settings: CacheConfig) -> str:
    """'Taylor per module': the name of the points with one colour and marker."""
    if settings.cache == "none":
        return "uncached"
    return "Δ-DiT" if settings.cache == "delta-dit" else f"{settings.cache.capitalize()} per {settings.granularity}"


def short_name(settings: SamplingConfig) -> str:
    """The label of a point in a plot: interval and order, such as '4/2'; of uncached sampling the steps."""
    if settings.cache == "none":
        return _steps(settings).removesuffix(" steps")
    words = str(settings.resolved_interval)
    if settings.cache == "delta-dit":
        return words if settings.gate is None else f"{words}, b {settings.gate}"
    if settings.cache != "reuse":
        words += f"/{settings.resolved_order}"
    if settings.spacing == "even":
        words += " even"
    return f"{words} ≤{settings.error_threshold:g}" if settings.error_threshold else words


def long_name(settings: SamplingConfig) -> str:
    """'Taylor per module, interval 4, order 2, 50 steps', for tables and sentences."""
    if settings.cache == "none":
        return _steps(settings).replace("steps", "uncached steps")
    gate = f", gate {settings.gate}" if settings.gate is not None else ""
    return f"{settings.describe_cache()}{gate}, {_steps(settings)}"


def _steps(settings: SamplingConfig) -> str:
    """'50 steps', or '50,38,26,15 steps, stagger 12'."""
    stagger = "" if settings.stagger is None else f", stagger {settings.stagger}"
    return f"{settings.cell_steps or settings.num_steps} steps{stagger}"


FOR_PIPELINES = ("num_images", "height", "width")
FOR_CHECKPOINTS = (
    "mode", "heun", "timestep_spacing", "time_shift", "stagger", "cfg_scale", "guidance_low", "guidance_high",
    "guided_channels", "cls_cfg_scale", "guidance_mode", "labels", "text_encoder", "ema", "ema_decay", "vae",
    "convention", "num_fid_samples", "per_proc_batch_size", "cuda_graphs", "features", "reference", "classifier_dir",
    "tolerance",
)  # fmt: skip


@dataclass(kw_only=True)
class SweepConfig(SamplingConfig):
    """The settings of `haste sweep`, which are its flags."""

    ckpt: Path | None = None
    """Checkpoint file, or run folder for its latest checkpoint."""
    pipeline: Path | None = None
    """In place of --ckpt: folder of a diffusers pipeline. Its images are compared with those of its own uncached run
    of --steps steps; there is no FD."""
    prompts: str = ""
    """A prompt, or a UTF-8 file with one on each line; with --ckpt of a model of text also a folder of captioned data
    [default: captions of the training data]; with --pipeline for classes, their numbers or names."""
    num_images: int = 4
    """With --pipeline: number of images per setting; they cycle through the prompts, each from its own noise."""
    height: int | None = None
    """With --pipeline: height of the images in pixels. [default: the pipeline's]"""
    width: int | None = None
    """With --pipeline: width of the images in pixels. [default: the pipeline's]"""

    # Of these settings of a point a sweep has lists, below.
    cache: Suppress[Fixed[str]] = "none"  # type: ignore[assignment]
    granularity: Suppress[Fixed[str]] = "module"  # type: ignore[assignment]
    interval: Suppress[Fixed[None]] = None
    order: Suppress[Fixed[None]] = None
    first_enhance: Suppress[Fixed[None]] = None
    spacing: Suppress[Fixed[str]] = "interval"  # type: ignore[assignment]
    full_steps: Suppress[Fixed[str]] = ""
    cell_steps: Suppress[Fixed[str]] = ""
    error_threshold: Suppress[Fixed[float]] = 0.0
    gate: Suppress[Fixed[None]] = None
    cached_blocks: Suppress[Fixed[None]] = None
    caches: tuple[Literal["reuse", "taylor", "newton", "hermite", "delta-dit"], ...] = ("taylor", "newton")
    """Values of --cache of haste sample."""
    granularities: tuple[Literal["module", "block", "model", "output"], ...] = ("module", "model")
    """Values of --granularity."""
    intervals: tuple[int, ...] = (3, 4, 5, 6)
    """Values of --interval."""
    orders: tuple[int, ...] = (2, 4)
    """Values of --order."""
    spacings: tuple[Literal["interval", "even"], ...] = ("interval",)
    """Values of --spacing, for the caches but delta-dit."""
    error_thresholds: tuple[float, ...] = (0.0,)
    """Values of --error-threshold; 0: evenly spaced full steps."""
    gates: tuple[int, ...] = ()
    """Values of --gate, for delta-dit. [default: 0.6 of the steps]"""
    steps: tuple[int, ...] = (50,)
    """Step counts of the runs with a cache. The largest, uncached, is the reference of the sweep."""
    num_steps: tuple[int, ...] = (10, 12, 14, 17, 20, 25)  # type: ignore[assignment]
    """Step counts of further runs without a cache: the alternative to caching."""

    num_fid_samples: int = 1000
    """Number of images to sample per setting."""
    per_proc_batch_size: int = 128
    """Batch size for sampling and timing."""
    labels: str = "balanced"
    """Class labels: random, balanced (0, 1, 2, ... in turn), or a list to cycle through, such as 3,1,4 or a text file
    with one class per line."""
    repeats: int = 3
    """Number of timings per setting, interleaved with those of all others."""
    cuda_graphs: bool = False
    """Replay the calls of cached models as CUDA graphs, as haste sample does. Not yet tried on a GPU."""
    features: str | None = None
    """Feature extractor: inception:PATH, the name or folder of a teacher, or digits. [default: digits, for digits]"""
    reference: str | None = None
    """Real images: an image folder, an .npz with arr_0 or with mu and sigma, or digits. [default: digits, for
    --features digits]"""
    classifier_dir: Path | None = None
    """Folder of the digits classifier. [default: classifier/ next to the runs]"""
    tolerance: float = 0.05
    """Maximum relative increase of FD over the uncached run for a setting to be recommended."""
    output: Path | None = None
    """Output folder for sweep.jsonl, sweep.md and sweep.png. [default: sweep/ in the run folder; with --pipeline
    sweep-NAME/ here]"""
    plot_only: bool = False
    """Only rewrite the table and the plot of the last sweep."""

    def check(self) -> None:
        check_numbers(self)
        self._check_source()
        self.base.check()
        fewest = min((*self.steps, *self.num_steps), default=1)
        replace(self.base, num_steps=fewest).check()
        for name in ("caches", "granularities", "intervals", "orders", "spacings", "error_thresholds", "steps"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} must have one value or more, got none")
        check_classifier_dir(self.classifier_dir)

    def _check_source(self) -> None:
        """Check that there is a checkpoint or a pipeline, and no flag of the other."""
        if (self.ckpt is None) == (self.pipeline is None):
            given = "neither" if self.ckpt is None else "both"
            raise UserError(f"a sweep must have either --ckpt or --pipeline, got {given}")
        unused = FOR_PIPELINES if self.pipeline is None else FOR_CHECKPOINTS
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unused and value != field.default:
                flag, other = field.name.replace("_", "-"), "--ckpt" if self.pipeline is None else "--pipeline"
                raise UserError(f"--{flag} must be left out with {other}, which does not use it, got {value}")

    def resolved(self) -> SweepConfig:
        """The same settings, without those that have no effect; with --pipeline `check` refuses them."""
        return self.effective() if self.pipeline is None else self

    @property
    def base(self) -> SamplingConfig:
        """The settings that all points share."""
        if self.pipeline is not None:
            return SamplingConfig(num_steps=max(self.steps, default=1), global_seed=self.global_seed)
        shared = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        texts = {"labels": list_labels(self.labels), "prompts": list_prompts(self.prompts)}
        return SamplingConfig(**{**shared, **texts, "num_steps": max(self.steps, default=1)})

    @property
    def points(self) -> list[SamplingConfig]:
        """Every combination of the lists, and the uncached runs."""
        values = {field.name: getattr(self, field.name) for field in fields(Grid)}
        return plan(self.base, [Grid(**{**values, "gates": self.gates or (None,)})], self.num_steps)
