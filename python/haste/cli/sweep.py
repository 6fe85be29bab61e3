"""Carries out `haste sweep`: measures what is not known yet, then writes the table and the plot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.cli.flags.sweep import Args
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.evaluate import real_side
from haste.evaluation.features import load_extractor
from haste.evaluation.metrics import check_sample_size
from haste.evaluation.reference import STORED
from haste.generation.checkpoint import LoadedCheckpoint, load_checkpoint
from haste.io import writing
from haste.resumable import hold
from haste.sweep.advice import LEGEND, advise, markdown, plain_text, recommend
from haste.sweep.measure import Quality, Sweep
from haste.sweep.points import RecordBook, Row, make_rows
from haste.validation import build

RECORDS, TABLE, PLOT = "sweep.jsonl", "sweep.md", "sweep.png"


def main(args: Args) -> None:
    """Measure what is not known yet, then draw, from the records alone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = args.draw_only and args.output
    student = None if known else load_checkpoint(args.ckpt, args.ema, convention=args.convention)
    folder = args.output or student.run / "sweep"
    for name in (TABLE, PLOT):
        if (folder / name).exists() and not (folder / RECORDS).exists():
            raise UserError(f"--output is {folder}, which holds a {name} but no {RECORDS}; it must be another folder")
    with hold(folder, f"{folder} is being filled", "give another --output, or wait until it has ended"):
        book = RecordBook(folder / RECORDS)
        shared = None if args.draw_only else measure(args, student, book)
        records = book.of(shared)
        with writing(f"a plot or a table in {folder}", "what was measured is kept, and --draw-only writes them"):
            draw(folder, make_rows(records), records[0]["sweep"], args.tolerance)


@dataclass
class Machine:
    """Of the machine what the table tells."""

    gpu: dict[str, Any] | None
    processor: Any
    threads: Any
    torch: Any


@dataclass
class Shared:
    """Of what the records of a sweep share what is drawn; with --draw-only it comes from a file."""

    student: str
    samples: int
    batch: int
    evaluated_by: Any
    machine: Machine


def measure(args: Args, student: LoadedCheckpoint, book: RecordBook) -> dict:
    """Measure under a progress bar; what the records of this sweep share."""
    quality = open_quality(args, student)
    counts = (args.num_fid_samples, args.per_proc_batch_size, args.repeats)
    sweep = Sweep(student, args.points, quality, book, *counts, args.cuda_graphs)
    with progress_bar(total=sweep.images, unit="image", desc="sweep") as bar:

        def progress(name: str, images: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(images)

        sweep.run(progress)
    for sentence in sweep.skipped:
        print(f"passed over: {sentence}")
    return sweep.shared


def open_quality(args: Args, student: LoadedCheckpoint) -> Quality:
    """The network and the real side that the flags name, or what follows from the run; prints a caution.

    Raises UserError for too few samples before it reads the real side, which may take hours.
    """
    features = args.features or ("digits" if student.config.data_dir == "digits" else None)
    if features in (None, STORED):
        raise UserError(f"--features is {features or 'not given'}; for other images than the digits it must be "
                        "inception:PATH, or a teacher's name or folder such as dinov2-vit-l")  # fmt: skip
    reference = args.reference or ("digits" if features == "digits" else None)
    if reference is None:
        raise UserError(f"--reference is not given; --features {features} needs a folder of real images, or an .npz "
                        "of images or statistics")  # fmt: skip
    classifier_dir = args.classifier_dir or student.run.resolve().parent / "classifier"
    extractor = load_extractor(features, classifier_dir)
    caution = check_sample_size(args.num_fid_samples, extractor.dimension)
    if caution:
        print(caution)
    return Quality(extractor, real_side(reference, extractor, args.per_proc_batch_size))


def draw(folder: Path, rows: list[Row], shared: dict, tolerance: float) -> None:
    """Print the table and the advice; write them and the plot."""
    from haste.sweep.plot import plot_sweep

    build(Shared, shared, "the sweep of a record")
    advice = advise(rows, tolerance)
    title = f"{shared['student']}, beside {rows[0].settings.describe()}: {shared['samples']:,} images a point"
    plot_sweep(folder / PLOT, rows, title=title, chosen=recommend(rows, tolerance))
    write_table(folder / TABLE, rows, title, shared, advice)
    print(f"\n{plain_text(rows)}\n\n{advice}\n\ntable  {folder / TABLE}\nplot   {folder / PLOT}")


def write_table(path: Path, rows: list[Row], title: str, shared: dict, advice: str) -> None:
    """The table with what it takes to read it."""
    from haste.io import write_text

    machine = shared["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} thread(s)"
    made = f"Batches of {shared['batch']}; torch {machine['torch']}, {where}. FD by {shared['evaluated_by']}."
    text = "\n\n".join([f"# {title}", f"![]({PLOT})", markdown(rows).rstrip(), LEGEND, made, advice]) + "\n"
    write_text(path, text)
