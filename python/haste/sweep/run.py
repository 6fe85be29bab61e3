"""A sweep from its settings to its files: measure what is not known yet, then write the table and the plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.config import STORED
from haste.evaluation.evaluate import Evaluator
from haste.evaluation.runs import choose_features
from haste.generation.checkpoint import LoadedCheckpoint, load_checkpoint
from haste.io import writing
from haste.registry import EXTRACTORS
from haste.resumable import hold
from haste.sweep.advice import LEGEND, advise, recommend, table
from haste.sweep.config import SweepConfig
from haste.sweep.measure import Sweep
from haste.sweep.records import RecordBook, Row, make_rows
from haste.tables import markdown_table, text_table
from haste.validation import build

RECORDS, TABLE, PLOT = "sweep.jsonl", "sweep.md", "sweep.png"


def run_sweep(config: SweepConfig) -> None:
    """Measure what is not known yet, then draw, from the records alone."""
    known = config.draw_only and config.output
    student = None if known else load_checkpoint(config.ckpt, config.ema, convention=config.convention)
    folder = config.output or student.run / "sweep"
    for name in (TABLE, PLOT):
        if (folder / name).exists() and not (folder / RECORDS).exists():
            raise UserError(f"--output is {folder}, which holds a {name} but no {RECORDS}; it must be another folder")
    with hold(folder, f"{folder} is being filled", "give another --output, or wait until it has ended"):
        book = RecordBook(folder / RECORDS)
        shared = None if config.draw_only else measure(config, student, book)
        records = book.of(shared)
        with writing(f"a plot or a table in {folder}", "what was measured is kept, and --draw-only writes them"):
            draw(folder, make_rows(records), records[0]["sweep"], config.tolerance)


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


def measure(config: SweepConfig, student: LoadedCheckpoint, book: RecordBook) -> dict:
    """Measure under a progress bar; what the records of this sweep share."""
    evaluator = open_evaluator(config, student)
    counts = (config.num_fid_samples, config.per_proc_batch_size, config.repeats)
    sweep = Sweep(student, config.points, evaluator, book, *counts, config.cuda_graphs)
    with progress_bar(total=sweep.images, unit="image", desc="sweep") as bar:

        def progress(name: str, images: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(images)

        sweep.run(progress)
    for sentence in sweep.skipped:
        print(f"passed over: {sentence}")
    return sweep.shared


def open_evaluator(config: SweepConfig, student: LoadedCheckpoint) -> Evaluator:
    """The network and the reference that the flags name, or what follows from the run; prints a caution.

    Raises UserError for too few samples before it reads the reference, which may take hours.
    """
    data = student.config.data_dir
    if config.features == STORED:
        raise UserError("--features is stored, and images are sampled; it must be a network")
    features, reference = choose_features(config.features or (data if data in EXTRACTORS else None), config.reference)
    folder = config.classifier_dir or student.run.resolve().parent / "classifier"
    count = config.num_fid_samples
    evaluator = Evaluator.load(features, reference, folder, config.per_proc_batch_size, samples=count)
    evaluator.reference.gaussian  # noqa: B018 - UserError for too few real images, before anything is sampled
    return evaluator


def draw(folder: Path, rows: list[Row], shared: dict, tolerance: float) -> None:
    """Print the table and the advice; write them and the plot."""
    from haste.sweep.plot import plot_sweep

    build(Shared, shared, "the sweep of a record")
    advice = advise(rows, tolerance)
    title = f"{shared['student']}, beside {rows[0].settings.describe()}: {shared['samples']:,} images a point"
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
