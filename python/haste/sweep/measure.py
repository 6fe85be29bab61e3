"""A sweep from its settings to its files: every point is sampled, evaluated and timed; then a table and a plot.

What was measured of a point is on the disk before the next one begins, so that a killed sweep resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from haste._compat import flop_counter
from haste.caching import check_memory
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.fidelity import compare_images
from haste.generation.config import SamplingConfig
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
from haste.generation.pipeline import Sampler, fit_to_family
from haste.generation.sample_dir import measure_full_steps
from haste.io import write_text
from haste.metrics.config import STORED, choose_features
from haste.metrics.evaluator import Evaluator
from haste.metrics.features import concatenate
from haste.registry import EXTRACTORS
from haste.sweep.config import SweepConfig, long_name, point_key, shared_fields
from haste.sweep.pipeline import Pipeline, PipelineSweep
from haste.sweep.records import (
    LEGEND,
    PIPELINE_LEGEND,
    PLOT,
    TABLE,
    Record,
    Row,
    SweepDir,
    advise,
    make_rows,
    recommend,
    table,
)
from haste.sweep.turns import Progress, Turns, stopwatch
from haste.tables import markdown_table, text_table
from haste.training.checkpoint import as_before, checkpoint_identity
from haste.validation import build
from haste_ext.bench.measure import describe_machine, peak_extra_bytes

# ---- one point ----

FLOP_IMAGES = 2


def count_cost(sampler: Sampler, batch: int) -> dict[str, Any]:
    """Measure the costs of a run of `batch` images that do not vary with the load of the machine.

    Returns:
        flops: per image, as torch.utils.flop_counter counts them in a real run: two per multiply-add of every matrix
            product and convolution, attention's included. Elementwise work and haste_ext's operations count nothing.
        peak_bytes: the highest memory during a run beyond what was held before it; None if unknown.
        cache_bytes: what the cached features hold at the end of the run.
        calls, full_calls: evaluations of the model.
        full_steps: their numbers; None without a cache.
    """
    start = sampler.start_of(range(batch))
    sampler.warm_up(batch)
    cache = sampler.cache
    if cache is not None:
        cache.release()  # its memory is part of the peak
    peak = peak_extra_bytes(lambda: (sampler.run(start),), start.noise.device.type, calls=1)
    calls, full = sampler.calls
    return {
        "flops": count_flops(sampler),
        "peak_bytes": peak,
        "cache_bytes": 0 if cache is None else cache.cache_bytes,
        "calls": calls,
        "full_calls": full,
        "full_steps": None if cache is None else cache.full_steps,
    }


def count_flops(sampler: Sampler) -> float:
    """FLOPs per image. Without CUDA graphs, as the counter does not see what a graph replays."""
    counted = sampler.with_settings(sampler.settings)
    with flop_counter() as counter:
        counted.run(counted.start_of(range(FLOP_IMAGES)))
    return counter.get_total_flops() / FLOP_IMAGES


def time_run(sampler: Sampler, batch: int) -> float:
    """Seconds per image of one run of `batch` images, after a warm-up: on a GPU, a whole run."""
    start = sampler.start_of(range(batch))
    on_gpu = start.noise.is_cuda
    if on_gpu:
        sampler.run(start)
    else:
        sampler.warm_up(batch)
    with stopwatch(on_gpu) as elapsed:
        sampler.run(start)
        return elapsed() / batch


# ---- all points ----

COMPARED = 256  # images whose fidelity to the reference's is measured


@dataclass
class Sweep(Turns):
    """Measures points of one checkpoint.

    Cached points that the model or the number of steps does not allow are skipped; `skipped` holds the reasons.

    Args:
        points: the first is the reference, the longest uncached run.
        samples: images to sample of each point.
        batch: images sampled at once.
        repeats: how often each point is timed.
        cuda_graphs: on a GPU, cached runs replay CUDA graphs; uncached runs only where images are made in parts.
    """

    loaded: LoadedCheckpoint
    points: list[SamplingConfig]
    evaluator: Evaluator
    folder: SweepDir
    samples: int
    batch: int
    repeats: int
    cuda_graphs: bool = False
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def shared(self) -> Record:
        """What the records of this sweep have in common."""
        machine = describe_machine(next(self.loaded.model.parameters()).device.type)
        prompts = self._reference.conditions.record() if self.points[0].prompts else {}
        own = self.loaded.convention  # decides guided channels and rounding
        return {
            **checkpoint_identity(self.loaded.checkpoint),
            "model": self.loaded.label,
            **({} if own == "repa" else {"convention": own}),
            "settings": {**shared_fields(self.points[0]), **prompts},
            "samples": self.samples,
            "batch": min(self.batch, self.samples),
            "cuda_graphs": self.cuda_graphs,
            "evaluated_by": self.evaluator.key,
            "machine": {name: machine[name] for name in ("device", "processor", "threads", "gpu", "torch")},
        }

    @property
    def images(self) -> int:
        """The number of images of `run`, if no point is skipped and none is known."""
        return len(self.points) * (self.samples + self.repeats * self.shared["batch"])

    def run(self, progress: Progress = lambda name, count: None) -> None:
        """Measure what is not known yet."""
        self.folder.rename(as_before(self.shared, self.loaded.checkpoint), self.shared)
        super().run(progress)

    @cached_property
    def _reference(self) -> Sampler:
        return Sampler(self.loaded, self.points[0])

    def _sampler(self, settings: SamplingConfig) -> Sampler:
        """A sampler with a cache of its own, so that only one point at a time holds the memory of a cache."""
        sampler = self._reference.with_settings(settings)
        if settings.error_threshold:  # as haste sample: the same full steps for all images, measured once
            sampler = sampler.with_full_steps(self._known(settings).get("full_steps") or measure_full_steps(sampler))
        if self.cuda_graphs and (settings.cache != "none" or self.loaded.family.in_parts):
            sampler.speed_up(compile=False, cuda_graphs=True)
        return sampler

    def _measure(self, settings: SamplingConfig, progress: Progress) -> bool:
        name = long_name(settings)
        if "fd" in self._known(settings):
            progress(name, self.samples)
            return True
        try:
            sampler = self._sampler(settings)
            model, shape, guided = self.loaded.model, self.loaded.layout.noise_shape, settings.cfg_scale > 1
            check_memory(model, settings, self.shared["batch"], guided, input_shape=shape)
            cost = count_cost(sampler, self.shared["batch"])
        except UserError as error:
            if settings.cache == "none":
                raise
            self.skipped.append(f"{name}: {error}")
            progress(name, self.samples + self.repeats * self.shared["batch"])
            return False
        parts, labels, first = [], [], []
        for start in range(0, self.samples, self.batch):
            indices = range(start, min(start + self.batch, self.samples))
            images, requested = sampler.sample(indices)
            parts.append(self.evaluator.extractor(images))
            labels.append(requested)
            first.append(images[: max(COMPARED - start, 0)])
            progress(name, len(indices))
        scores = self.evaluator.values(concatenate(parts), np.concatenate(labels), ("fd", "label_accuracy"))
        self._add(settings, **cost, **scores, **self._fidelity(settings, np.concatenate(first)))
        return True

    def _fidelity(self, settings: SamplingConfig, images: np.ndarray) -> dict[str, Any]:
        """PSNR and SSIM with the reference's images; none with other noise, as another number of noisy steps has."""
        reference = self.points[0]
        if settings is reference or (settings.noisy and settings.num_steps != reference.num_steps):
            return {"psnr": None, "ssim": None}
        return compare_images(images, self._reference_images).pooled()

    @cached_property
    def _reference_images(self) -> np.ndarray:
        count = min(COMPARED, self.samples)
        batches = (range(start, min(start + self.batch, count)) for start in range(0, count, self.batch))
        return np.concatenate([self._reference.sample(indices)[0] for indices in batches])

    def _seconds(self, settings: SamplingConfig) -> float:
        return time_run(self._sampler(settings), self.shared["batch"])


# ---- the command ----


def run_sweep(config: SweepConfig) -> None:
    """Measure what is not known yet; write the table and the plot from the records alone."""
    loaded: LoadedCheckpoint | Pipeline | None = None
    if config.plot_only and config.output:
        output = config.output
    elif config.pipeline is not None:
        output = config.output or Path(f"sweep-{config.pipeline.resolve().name}")
        loaded = None if config.plot_only else Pipeline.load(config)
    else:
        assert config.ckpt is not None  # as SweepConfig has checked
        loaded = load_checkpoint(config.ckpt, config.weights, convention=config.convention)
        output = config.output or loaded.run / "sweep"
    folder = SweepDir(output)
    with folder.hold():
        shared = None if config.plot_only or loaded is None else measure_points(config, loaded, folder)
        records = folder.complete(shared)
        if not records and config.plot_only:
            raise UserError(f"--plot-only needs an earlier sweep, got {output}, which holds none")
        with folder.writing():
            write_files(output, make_rows(records), records[0]["sweep"], config.tolerance)


def fitting(points: Sequence[SamplingConfig], loaded: LoadedCheckpoint) -> list[SamplingConfig]:
    """The points as the model's family has them, each once; those that it cannot have as they are, to be skipped.

    Raises:
        UserError: an uncached one that it cannot have.
    """
    fitted: dict[str, SamplingConfig] = {}
    for settings in points:
        try:
            chosen = fit_to_family(settings, loaded)
        except UserError:
            if settings.cache == "none":
                raise
            chosen = settings
        fitted.setdefault(point_key(chosen), chosen)
    return list(fitted.values())


def measure_points(config: SweepConfig, loaded: LoadedCheckpoint | Pipeline, folder: SweepDir) -> Record:
    """Measure under a progress bar; returns what the records of this sweep share."""
    sweep: Sweep | PipelineSweep
    if isinstance(loaded, Pipeline):
        sweep = PipelineSweep(loaded, config.points, folder, config.num_images, config.repeats)
    else:
        evaluator = open_evaluator(config, loaded)
        counts = (config.num_fid_samples, config.per_proc_batch_size, config.repeats)
        sweep = Sweep(loaded, fitting(config.points, loaded), evaluator, folder, *counts, config.cuda_graphs)
    with progress_bar(total=sweep.images, unit="image", desc="sweep") as bar:

        def progress(name: str, images: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(images)

        sweep.run(progress)
    for reason in sweep.skipped:
        print(f"skipped: {reason}")
    return sweep.shared


def open_evaluator(config: SweepConfig, loaded: LoadedCheckpoint) -> Evaluator:
    """The network and the reference of the flags, or else of the run.

    Raises:
        UserError: too few samples; before the reference is read, which may take hours.
    """
    data = loaded.config.data_dir
    if config.features == STORED:
        raise UserError("--features must be a network, as images are sampled, got stored")
    features, reference = choose_features(config.features or (data if data in EXTRACTORS else None), config.reference)
    folder = config.classifier_dir or loaded.run.resolve().parent / "classifier"
    count = config.num_fid_samples
    evaluator = Evaluator.load(features, reference, folder, config.per_proc_batch_size, samples=count)
    evaluator.reference.gaussian  # noqa: B018 - UserError for too few real images, before anything is sampled
    return evaluator


@dataclass
class _Machine:
    gpu: dict[str, Any] | None
    processor: Any
    threads: Any
    torch: Any


@dataclass
class _Shared:
    """The part of what records share that is written below a table; with --plot-only it comes from a file."""

    model: str
    samples: int
    batch: int
    evaluated_by: Any
    machine: _Machine


def write_files(folder: Path, rows: list[Row], sweep: Record, tolerance: float) -> None:
    """Print the table and the advice; write them, and the plot."""
    from haste.sweep.plot import plot_sweep

    shared = build(_Shared, sweep, "the sweep of a record")
    machine = shared.machine
    advice = advise(rows, tolerance)
    steps = f"{rows[0].settings.num_steps} steps" if rows[0].fd is None else rows[0].settings.describe()
    title = f"{shared.model}, beside {steps}: {shared.samples:,} images a point"
    plot_sweep(folder / PLOT, rows, title=title, chosen=recommend(rows, tolerance))
    where = machine.gpu["name"] if machine.gpu else f"{machine.processor}, {machine.threads} thread(s)"
    made = f"Batches of {shared.batch}; torch {machine.torch}, {where}."
    legend = PIPELINE_LEGEND if rows[0].fd is None else LEGEND
    if rows[0].fd is not None:
        made += f" FD by {shared.evaluated_by}."
    parts = [f"# {title}", f"![]({PLOT})", markdown_table(table(rows)).rstrip(), legend, made, advice]
    write_text(folder / TABLE, "\n\n".join(parts) + "\n")
    print(f"\n{text_table(table(rows))}\n\n{advice}\n\ntable  {folder / TABLE}\nplot   {folder / PLOT}")
