"""A sweep from its settings to its files: every point is sampled, evaluated and timed; then a table and a plot.

What is known of a point is on the disk before the next one begins, so a sweep that was killed resumes where it stopped.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from haste._compat import flop_counter
from haste.caching import check_memory
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.config import STORED
from haste.evaluation.evaluate import Evaluator
from haste.evaluation.features import concatenate
from haste.evaluation.fidelity import compare_images
from haste.evaluation.runs import choose_features
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import LoadedCheckpoint, Sampler, load_checkpoint
from haste.generation.sample_dir import measure_full_steps
from haste.io import writing
from haste.registry import EXTRACTORS
from haste.resumable import hold
from haste.sweep.config import SweepConfig, long_name, point_fields, shared_fields
from haste.sweep.records import LEGEND, RecordBook, Row, advise, make_rows, recommend, table
from haste.tables import markdown_table, text_table
from haste.training.checkpoint import as_before, checkpoint_identity
from haste.validation import build
from haste_ext.bench.measure import describe_machine, peak_extra_bytes

FLOP_IMAGES = 2


def count_cost(sampler: Sampler, batch: int) -> dict[str, Any]:
    """What does not depend on the machine's mood, of a run of `batch` images.

    flops: per image, as torch.utils.flop_counter counts them in a real run: two per multiply-add of every matrix
    product and convolution, attention's included. Elementwise work and the operations of haste_ext count nothing.
    peak_bytes: the highest memory during a run beyond what was held before it, weights for example; None if unknown.
    cache_bytes: what the cached features hold at the end of the run. calls, full_calls: evaluations of the model.
    full_steps: their numbers; None without a cache.
    """
    start = sampler.start_of(range(batch))
    sampler.warm_up(batch)
    if sampler.cache is not None:
        sampler.cache.release()  # its memory is part of the peak
    peak = peak_extra_bytes(lambda: (sampler.run(start),), start.noise.device.type, calls=1)
    calls, full = sampler.calls
    cache = sampler.cache
    return {
        "flops": count_flops(sampler),
        "peak_bytes": peak,
        "cache_bytes": 0 if cache is None else cache.cache_bytes,
        "calls": calls,
        "full_calls": full,
        "full_steps": None if cache is None else cache.full_steps,
    }


def count_flops(sampler: Sampler) -> float:
    """Per image. Without CUDA graphs, as what a graph replays is not counted."""
    counted = sampler.with_settings(sampler.settings)
    with flop_counter() as counter:
        counted.run(counted.start_of(range(FLOP_IMAGES)))
    return counter.get_total_flops() / FLOP_IMAGES


def time_run(sampler: Sampler, batch: int) -> float:
    """Seconds per image of one run of `batch` images, after what a first call sets up: on a GPU, a whole run."""
    start = sampler.start_of(range(batch))
    on_gpu = start.noise.is_cuda
    if on_gpu:
        sampler.run(start)
        torch.cuda.synchronize()
    else:
        sampler.warm_up(batch)
    collecting = gc.isenabled()
    gc.disable()  # a collection takes as long as many steps, and would hit some runs and not others
    try:
        begin = perf_counter()
        sampler.run(start)
        if on_gpu:
            torch.cuda.synchronize()
        return (perf_counter() - begin) / batch
    finally:
        if collecting:
            gc.enable()


COMPARED = 256  # images that are held beside the reference's

Progress = Callable[[str, int], None]


@dataclass
class Sweep:
    """Measures `points` of one checkpoint. The first is the reference: the longest run with every step in full.

    samples: images to sample of each point. batch: how many at once. repeats: how often each point is timed.

    cuda_graphs: on a GPU cached runs replay CUDA graphs, as with haste sample --cuda-graphs; uncached runs never do.

    A cached point that the model or the number of steps does not allow is passed over; `skipped` says why.
    """

    loaded: LoadedCheckpoint
    points: list[SamplingConfig]
    evaluator: Evaluator
    book: RecordBook
    samples: int
    batch: int
    repeats: int
    cuda_graphs: bool = False
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What the records of this sweep have in common."""
        device = str(next(self.loaded.model.parameters()).device.type)
        machine = describe_machine(device)
        return {
            **checkpoint_identity(self.loaded.checkpoint),
            "model": self.loaded.label,
            **({"convention": "sit"} if self.loaded.rounded else {}),  # how it is guided and rounded
            "settings": shared_fields(self.points[0]),
            "samples": self.samples,
            "batch": min(self.batch, self.samples),
            "cuda_graphs": self.cuda_graphs,
            "evaluated_by": self.evaluator.key,
            "machine": {name: machine[name] for name in ("device", "processor", "threads", "gpu", "torch")},
        }

    @property
    def images(self) -> int:
        """How many images `run` samples in all, if no point is passed over and none is known."""
        return len(self.points) * (self.samples + self.repeats * self.shared["batch"])

    def run(self, progress: Progress = lambda name, count: None) -> None:
        """Measures what is not known yet. `progress` hears a point's name and how many of its images are done."""
        self.book.rename(as_before(self.shared, self.loaded.checkpoint), self.shared)
        possible = [settings for settings in self.points if self._measure_quality(settings, progress)]
        for turn in range(self.repeats):
            self._time(possible, turn, progress)

    @cached_property
    def _reference(self) -> Sampler:
        return Sampler(self.loaded, self.points[0])

    def _sampler(self, settings: SamplingConfig) -> Sampler:
        """One with a cache of its own, so that a cache's memory is held for one point at a time."""
        sampler = self._reference.with_settings(settings)
        if settings.error_threshold:  # as haste sample: the same full steps for all images, measured once
            steps = self._known(settings).get("full_steps")
            steps = steps or measure_full_steps(sampler)
            sampler = sampler.with_full_steps(steps)
        if self.cuda_graphs and settings.cache != "none":
            sampler.speed_up(compile=False, cuda_graphs=True)
        return sampler

    def _measure_quality(self, settings: SamplingConfig, progress: Progress) -> bool:
        """Sample one point's images, and whether that is possible. A full run's errors are the command's."""
        if "fd" in self._known(settings):
            progress(long_name(settings), self.samples)
            return True
        try:
            sampler = self._sampler(settings)
            check_memory(self.loaded.model, settings, self.shared["batch"], guided=settings.cfg_scale > 1)
            cost = count_cost(sampler, self.shared["batch"])
        except UserError as error:
            if settings.cache == "none":
                raise
            self.skipped.append(f"{long_name(settings)}: {error}")
            progress(long_name(settings), self.samples + self.repeats * self.shared["batch"])
            return False
        self.book.keep(self.shared, point_fields(settings), **cost, **self._sample(settings, sampler, progress))
        return True

    def _known(self, settings: SamplingConfig) -> dict[str, Any]:
        return self.book.find(self.shared, point_fields(settings))

    def _sample(self, settings: SamplingConfig, sampler: Sampler, progress: Progress) -> dict[str, Any]:
        """The quality of one point's images."""
        parts, labels, first = [], [], []
        for start in range(0, self.samples, self.batch):
            indices = range(start, min(start + self.batch, self.samples))
            images, asked = sampler.sample(indices)
            parts.append(self.evaluator.extractor(images))
            labels.append(asked)
            first.append(images[: max(COMPARED - start, 0)])
            progress(long_name(settings), len(indices))
        scores = self.evaluator.values(concatenate(parts), np.concatenate(labels), ("fd", "label_accuracy"))
        return {**scores, **self._fidelity(settings, np.concatenate(first))}

    def _fidelity(self, settings: SamplingConfig, images: np.ndarray) -> dict[str, Any]:
        """With the reference's images. In the SDE another number of steps is other noise, and nothing is alike."""
        reference = self.points[0]
        if settings is reference or (settings.mode == "sde" and settings.num_steps != reference.num_steps):
            return {"psnr": None, "ssim": None}
        return compare_images(images, self._baseline).pooled()

    @cached_property
    def _baseline(self) -> np.ndarray:
        """The reference's first images, sampled again: what fidelity is measured against."""
        count = min(COMPARED, self.samples)
        batches = (range(start, min(start + self.batch, count)) for start in range(0, count, self.batch))
        return np.concatenate([self._reference.sample(indices)[0] for indices in batches])

    def _time(self, points: list[SamplingConfig], turn: int, progress: Progress) -> None:
        """One turn of every point that lacks it, in an order of its own, the reference first.

        A machine drifts, so the ratio to the reference is taken within a turn; one that was cut short by a kill goes on
        with a reference of its own.
        """
        lacking = [settings for settings in points if len(self._seconds(settings)) <= turn]
        for settings in points:
            if settings not in lacking:
                progress(long_name(settings), self.shared["batch"])
        if not lacking:
            return
        reference = self._seconds_of_a_run(points[0])
        for settings in random.Random(turn).sample(lacking, len(lacking)):
            own = reference if settings is points[0] else self._seconds_of_a_run(settings)
            known = self._known(settings)
            self.book.keep(
                self.shared,
                point_fields(settings),
                seconds=[*known.get("seconds", []), own],
                reference_seconds=[*known.get("reference_seconds", []), reference],
            )
            progress(long_name(settings), self.shared["batch"])

    def _seconds(self, settings: SamplingConfig) -> list[float]:
        return self._known(settings).get("seconds", [])

    def _seconds_of_a_run(self, settings: SamplingConfig) -> float:
        return time_run(self._sampler(settings), self.shared["batch"])


RECORDS, TABLE, PLOT = "sweep.jsonl", "sweep.md", "sweep.png"


def run_sweep(config: SweepConfig) -> None:
    """Measure what is not known yet, then plot, from the records alone."""
    known = config.plot_only and config.output
    loaded = None if known else load_checkpoint(config.ckpt, config.ema, convention=config.convention)
    folder = config.output or loaded.run / "sweep"
    for name in (TABLE, PLOT):
        if (folder / name).exists() and not (folder / RECORDS).exists():
            raise UserError(f"--output is {folder}, which holds a {name} but no {RECORDS}; it must be another folder")
    with hold(folder, f"{folder} is being filled", "give another --output, or wait until it has ended"):
        book = RecordBook(folder / RECORDS)
        shared = None if config.plot_only else measure_points(config, loaded, book)
        records = book.of(shared)
        with writing(f"a plot or a table in {folder}", "what was measured is kept, and --plot-only writes them"):
            write_files(folder, make_rows(records), records[0]["sweep"], config.tolerance)


@dataclass
class Machine:
    """Of the machine what the table tells."""

    gpu: dict[str, Any] | None
    processor: Any
    threads: Any
    torch: Any


@dataclass
class Shared:
    """Of what the records of a sweep share what is plotted; with --plot-only it comes from a file."""

    model: str
    samples: int
    batch: int
    evaluated_by: Any
    machine: Machine


def measure_points(config: SweepConfig, loaded: LoadedCheckpoint, book: RecordBook) -> dict:
    """Measure under a progress bar; what the records of this sweep share."""
    evaluator = open_evaluator(config, loaded)
    counts = (config.num_fid_samples, config.per_proc_batch_size, config.repeats)
    sweep = Sweep(loaded, config.points, evaluator, book, *counts, config.cuda_graphs)
    with progress_bar(total=sweep.images, unit="image", desc="sweep") as bar:

        def progress(name: str, images: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(images)

        sweep.run(progress)
    for sentence in sweep.skipped:
        print(f"passed over: {sentence}")
    return sweep.shared


def open_evaluator(config: SweepConfig, loaded: LoadedCheckpoint) -> Evaluator:
    """The network and the reference that the flags name, or what follows from the run; prints a caution.

    Raises UserError for too few samples before it reads the reference, which may take hours.
    """
    data = loaded.config.data_dir
    if config.features == STORED:
        raise UserError("--features is stored, and images are sampled; it must be a network")
    features, reference = choose_features(config.features or (data if data in EXTRACTORS else None), config.reference)
    folder = config.classifier_dir or loaded.run.resolve().parent / "classifier"
    count = config.num_fid_samples
    evaluator = Evaluator.load(features, reference, folder, config.per_proc_batch_size, samples=count)
    evaluator.reference.gaussian  # noqa: B018 - UserError for too few real images, before anything is sampled
    return evaluator


def write_files(folder: Path, rows: list[Row], shared: dict, tolerance: float) -> None:
    """Print the table and the advice; write them and the plot."""
    from haste.sweep.plot import plot_sweep

    build(Shared, shared, "the sweep of a record")
    advice = advise(rows, tolerance)
    title = f"{shared['model']}, beside {rows[0].settings.describe()}: {shared['samples']:,} images a point"
    plot_sweep(folder / PLOT, rows, title=title, chosen=recommend(rows, tolerance))
    write_table(folder / TABLE, rows, title, shared, advice)
    print(f"\n{text_table(table(rows))}\n\n{advice}\n\ntable  {folder / TABLE}\nplot   {folder / PLOT}")


def write_table(path: Path, rows: list[Row], title: str, shared: dict, advice: str) -> None:
    """The table with what it takes to read it."""
    from haste.io import write_text

    machine = shared["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} thread(s)"
    made = f"Batches of {shared['batch']}; torch {machine['torch']}, {where}. FD by {shared['evaluated_by']}."
    text = (
        "\n\n".join([f"# {title}", f"![]({PLOT})", markdown_table(table(rows)).rstrip(), LEGEND, made, advice]) + "\n"
    )
    write_text(path, text)
