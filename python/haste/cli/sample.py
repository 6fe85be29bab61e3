"""Draw pictures from a checkpoint of `haste train`: PNGs, an .npz for evaluators, and a grid to look at.

The flags are those of SiT's and REPA's generate.py. `--cache taylor` is TaylorSeer: only some steps are
computed in full, and the others are forecast. A command that was stopped goes on with the pictures that are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from haste.errors import UserError
from haste.generation.drawing import Sampler
from haste.generation.labels import choose_labels
from haste.generation.sample_folder import SampleFolder, Samples
from haste.generation.settings import SamplingSettings
from haste.generation.student import Student, load_student

GRID_PICTURES = 100


@dataclass(kw_only=True)
class Args(SamplingSettings):
    """The flags of `haste sample`."""

    ckpt: Path
    """A checkpoint file, or the folder of a run: then its newest whole checkpoint."""
    num_fid_samples: int = 100
    """How many pictures to draw. (50,000 for a published FID.)"""
    per_proc_batch_size: int = 128
    """Pictures per batch. Changes the speed and the memory, not the pictures."""
    sample_dir: Path | None = None
    """Where the folder of pictures goes; by default samples/ in the run's folder."""

    def check(self) -> None:
        super().check()
        for name in ("num_fid_samples", "per_proc_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


def main(args: Args) -> None:
    """Draw, and say what came out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report(sample_to_folder(args))


def report(samples: Samples) -> None:
    """Print how fast pictures came and where they are."""
    folder, drawn = samples.folder, samples.drawn
    print(
        f"{len(samples.images)} pictures at {drawn.pictures_per_second:.1f} images/s "
        f"({drawn.seconds:.2f} s for {drawn.pictures}); {drawn.full_per_picture} of "
        f"{drawn.evaluations_per_picture} model evaluations were full"
    )
    print(f"pictures  {folder.path}\nnpz       {folder.npz}\ngrid      {folder.grid}")


def sample_to_folder(args: Args) -> Samples:
    """Draw what is missing of a command's pictures and write the .npz and the grid.

    Raises UserError for settings or a checkpoint that cannot work, and for a folder that belongs to another command.
    """
    args.check()
    student = load_student(args.ckpt, args.ema)
    sampler = Sampler(student, args)
    labels = choose_labels(args.labels, args.global_seed, range(args.num_fid_samples), student.model.num_classes)
    folder = SampleFolder(folder_path(args, student), settings_record(args, student))
    draw_missing(sampler, folder, args.num_fid_samples, args.per_proc_batch_size)
    images = folder.collect(args.num_fid_samples, labels)
    write_grid(args, student, folder, images, labels)
    return Samples(images, labels, folder)


def folder_path(args: Args, student: Student) -> Path:
    """<sample_dir>/<checkpoint>-<sampler>-<steps>...: the settings that people vary are in the name."""
    parts = [student.checkpoint.stem, args.sampler, str(args.num_steps)]
    parts += [f"cfg{args.cfg_scale:g}", f"seed{args.global_seed}"]
    if args.cache != "none":
        parts.append(f"{args.cache}-i{args.resolved_interval}-o{args.resolved_order}")
    return (args.sample_dir or student.run / "samples") / "-".join(parts)


def settings_record(args: Args, student: Student) -> dict:
    """Everything that decides the pictures, for sample.json. The time of the file tells a retrained checkpoint."""
    checkpoint = {
        "checkpoint": student.checkpoint.name,
        "checkpoint_written": student.checkpoint.stat().st_mtime_ns,
    }
    return {**checkpoint, **args.sampling_fields()}


def draw_missing(sampler: Sampler, folder: SampleFolder, count: int, batch_size: int) -> None:
    """Draw the pictures below `count` that the folder lacks, in batches, under a progress bar."""
    from tqdm import tqdm

    missing = folder.missing(count)
    if missing:
        sampler.warm_up(min(len(missing), batch_size))
    with tqdm(total=count, initial=count - len(missing), unit="image", desc="sample") as bar:
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            begin = perf_counter()
            images, _ = sampler.draw(indices, advance(bar, len(indices)))
            seconds = perf_counter() - begin
            folder.add(indices, images, seconds, *sampler.calls)


def advance(bar, pictures: int) -> Callable[[int, int], None]:
    """Moves the bar by whole pictures while the steps of one batch go by."""
    base = bar.n

    def progress(step: int, steps: int) -> None:
        bar.update(base + pictures * step // steps - bar.n)

    return progress


def write_grid(args: Args, student: Student, folder: SampleFolder, images: np.ndarray, labels: np.ndarray) -> None:
    """The labelled grid of the first pictures, in the order of their labels."""
    from haste.evaluation.pictures import draw_grid  # brings matplotlib

    order = np.argsort(labels[:GRID_PICTURES], kind="stable")
    title = f"{student.label}: {args.describe()}"
    draw_grid(folder.grid, images[order], labels[order], title=title)
