"""Draw the trade-off of feature caching: quality against seconds, FLOPs and memory, beside plain runs of fewer steps.

Every combination of the lists is drawn from one checkpoint, judged and timed; the table and the plot say which of them
are worth it. What a setting cannot do is passed over with a line. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Fixed, Suppress

from haste.errors import UserError
from haste.evaluation.evaluator import Evaluator
from haste.evaluation.metrics import MetricSettings
from haste.evaluation.reference import STORED
from haste.generation.labels import list_labels
from haste.generation.settings import SamplingSettings
from haste.generation.student import Student, load_student
from haste.sweep.advice import advise, recommend
from haste.sweep.measure import Sweep
from haste.sweep.points import Grid, plan
from haste.sweep.quality import Quality
from haste.sweep.records import RecordBook
from haste.sweep.rows import Row, make_rows
from haste.sweep.table import LEGEND, markdown, plain_text

RECORDS, TABLE, PLOT = "sweep.jsonl", "sweep.md", "sweep.png"


@dataclass(kw_only=True)
class Args(SamplingSettings):
    """The flags of `haste sweep`."""

    ckpt: Path
    """A checkpoint file, or the folder of a run: then its newest whole checkpoint."""

    # What every point has one of, a sweep has lists of.
    cache: Suppress[Fixed[str]] = "none"
    granularity: Suppress[Fixed[str]] = "module"
    interval: Suppress[Fixed[None]] = None
    order: Suppress[Fixed[None]] = None
    first_enhance: Suppress[Fixed[None]] = None
    full_steps: Suppress[Fixed[str]] = ""
    max_error: Suppress[Fixed[float]] = 0.0
    gate: Suppress[Fixed[None]] = None
    cached_blocks: Suppress[Fixed[None]] = None
    caches: tuple[Literal["reuse", "taylor", "newton", "hermite", "delta-dit"], ...] = ("taylor", "newton")
    """What stands in for a skipped step, as --cache of haste sample."""
    granularities: tuple[Literal["module", "block", "model"], ...] = ("module", "model")
    """What is forecast, as --granularity."""
    intervals: tuple[int, ...] = (3, 4, 5, 6)
    """One full step in so many, as --interval."""
    orders: tuple[int, ...] = (2, 4)
    """Orders of the forecast, as --order."""
    max_errors: tuple[float, ...] = (0.0,)
    """Bounds on the error of a forecast, as --max-error; 0: evenly spaced full steps."""
    gates: tuple[int, ...] = ()
    """delta-dit: where the skipped blocks change, as --gate. [default: 0.6 of the steps]"""
    steps: tuple[int, ...] = (50,)
    """Steps of the cached runs, each of which is run in full as well."""
    num_steps: tuple[int, ...] = (10, 12, 14, 17, 20, 25)  # type: ignore[assignment]
    """Steps of the plain runs that caching has to beat."""

    num_fid_samples: int = 1000
    """How many pictures to draw of each point."""
    per_proc_batch_size: int = 128
    """Pictures per batch, in which they are also timed."""
    labels: str = "balanced"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn: such as 3,1,4, or a text file
    with one on each line."""
    repeats: int = 3
    """How often each point is timed; all take turns."""
    cuda_graphs: bool = False
    """On a GPU: cached runs replay CUDA graphs, as with haste sample. Plain runs never do. Not yet tried on a GPU."""
    features: str | None = None
    """Whose features, as for haste evaluate: inception:PATH, a teacher's name or folder, or digits. [default: digits,
    for a run on digits]"""
    reference: str | None = None
    """The real side: a folder of pictures, an .npz with arr_0 or with mu and sigma, or digits. [default: digits, for
    --features digits]"""
    judge_dir: Path | None = None
    """Where the judge of the digits is kept; by default judge/ beside the runs."""
    tolerance: float = 0.05
    """A setting is good enough if its distance is so much above the full run's at most, as a share of it."""
    output: Path | None = None
    """Where sweep.jsonl, sweep.md and sweep.png go; by default sweep/ in the run's folder."""
    draw_only: bool = False
    """Measure nothing: the table and the plot of the sweep that was measured last."""

    def check(self) -> None:
        self.base.check()
        for name in ("num_fid_samples", "per_proc_batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.steps:
            raise UserError("--steps is empty; it must be one number of steps or more")
        for name in ("steps", "num_steps"):
            if min(getattr(self, name), default=1) < 1:
                flag, given = name.replace("_", "-"), " ".join(map(str, getattr(self, name)))
                raise UserError(f"--{flag} is {given}; it must be at least 1")
        if self.tolerance < 0:
            raise UserError(f"--tolerance is {self.tolerance}; it must be at least 0")

    @property
    def base(self) -> SamplingSettings:
        """What all points share."""
        shared = {field.name: getattr(self, field.name) for field in fields(SamplingSettings)}
        chosen = {"num_steps": max(self.steps, default=1), "labels": list_labels(self.labels)}
        return SamplingSettings(**{**shared, **chosen})

    @property
    def points(self) -> list[SamplingSettings]:
        grid = Grid(
            caches=self.caches,
            granularities=self.granularities,
            intervals=self.intervals,
            orders=self.orders,
            max_errors=self.max_errors,
            gates=self.gates or (None,),
            steps=self.steps,
        )
        return plan(self.base, [grid], self.num_steps)


def main(args: Args) -> None:
    """Measure what is not known yet, then draw, from the records alone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.check()
    student = None if args.draw_only and args.output else load_student(args.ckpt, args.ema)
    folder = args.output or student.run / "sweep"
    book = RecordBook(folder / RECORDS)
    shared = None if args.draw_only else measure(args, student, book)
    records = book.of(shared)
    draw(folder, make_rows(records), records[0]["sweep"], args.tolerance)


def measure(args: Args, student: Student, book: RecordBook) -> dict:
    """Measure under a progress bar; what the records of this sweep share."""
    from tqdm import tqdm

    quality = open_quality(args, student)
    caution = quality.check_count(args.num_fid_samples)
    if caution:
        print(caution)
    counts = (args.num_fid_samples, args.per_proc_batch_size, args.repeats)
    sweep = Sweep(student, args.points, quality, book, *counts, args.cuda_graphs)
    with tqdm(total=sweep.pictures, unit="image", desc="sweep") as bar:

        def progress(name: str, pictures: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(pictures)

        sweep.run(progress)
    for sentence in sweep.skipped:
        print(f"passed over: {sentence}")
    return sweep.shared


def open_quality(args: Args, student: Student) -> Quality:
    """The network and the real side that the flags name, or what follows from the run."""
    features = args.features or ("digits" if student.config.data_dir == "digits" else None)
    if features in (None, STORED):
        raise UserError(f"--features is {features or 'not given'}; for other pictures than the digits it must be "
                        "inception:PATH, or a teacher's name or folder such as dinov2-vit-l")  # fmt: skip
    reference = args.reference or ("digits" if features == "digits" else None)
    if reference is None:
        raise UserError(f"--reference is not given; --features {features} needs a folder of real pictures, or an .npz "
                        "of pictures or statistics")  # fmt: skip
    judge_dir = args.judge_dir or student.run.resolve().parent / "judge"
    evaluator = Evaluator(features, reference, judge_dir, args.per_proc_batch_size, MetricSettings())
    return Quality(evaluator.extractor, evaluator.reference)


def draw(folder: Path, rows: list[Row], shared: dict, tolerance: float) -> None:
    """Print the table and the advice; write them and the plot."""
    from haste.sweep.plot import draw_sweep  # brings matplotlib

    advice = advise(rows, tolerance)
    title = f"{shared['student']}, beside {rows[0].settings.describe()}: {shared['samples']:,} pictures a point"
    draw_sweep(folder / PLOT, rows, title=title, chosen=recommend(rows, tolerance))
    write_table(folder / TABLE, rows, title, shared, advice)
    print(f"\n{plain_text(rows)}\n\n{advice}\n\ntable  {folder / TABLE}\nplot   {folder / PLOT}")


def write_table(path: Path, rows: list[Row], title: str, shared: dict, advice: str) -> None:
    """The table with what it takes to read it."""
    from haste.io import write_text

    machine = shared["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} thread(s)"
    made = f"Batches of {shared['batch']}; torch {machine['torch']}, {where}. Distance by {shared['judged_by']}."
    text = "\n\n".join([f"# {title}", f"![]({PLOT})", markdown(rows).rstrip(), LEGEND, made, advice]) + "\n"
    write_text(path, text)
