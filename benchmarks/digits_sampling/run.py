"""Cached sampling on the digits beside uncached sampling with fewer steps: quality, seconds, FLOPs, on three seeds.

    python benchmarks/digits_sampling/run.py                 all that is not done yet, then the table and the plot
    python benchmarks/digits_sampling/run.py --seeds 0       of that, one seed
    python benchmarks/digits_sampling/run.py --plot-only     the table and the plot from results.json alone
    python benchmarks/digits_sampling/run.py --cfg-scale 1.5 --output benchmarks/digits_sampling/guided

The models are those of benchmarks/digits, HASTE with seeds 0, 1 and 2, trained first if they are not there. All points
of all seeds use the same noise and labels. What was measured is kept as it is known: a run that was stopped goes on.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.io import write_text
from haste.metrics.evaluator import Evaluator
from haste.sweep.config import Grid, plan
from haste.sweep.measure import Sweep
from haste.sweep.plot import plot_sweep
from haste.sweep.records import (
    LEGEND,
    Row,
    SweepDir,
    average,
    describe,
    good_enough,
    make_rows,
    recommend,
    table,
)
from haste.tables import markdown_table
from haste.training.config import TrainConfig
from tqdm import tqdm

from haste_ext.bench.measure import describe_machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import read_results, train_to_end, write_results  # noqa: E402

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.05

BASE = SamplingConfig(labels="balanced")
UNCACHED_STEPS = (10, 12, 14, 17, 20, 25)
INTERVALS = (3, 4, 5, 6)
GRIDS = (
    Grid(caches=("taylor",), intervals=INTERVALS, orders=(1, 2, 3, 4)),  # TaylorSeer
    Grid(caches=("newton",), intervals=INTERVALS, orders=(4,)),
    Grid(caches=("taylor",), granularities=("model",), intervals=INTERVALS, orders=(4,)),
    Grid(caches=("newton",), granularities=("model",), intervals=INTERVALS, orders=(2, 4)),
    Grid(caches=("newton",), granularities=("model",), spacings=("even",), intervals=INTERVALS, orders=(2, 4)),
    Grid(caches=("newton",), granularities=("output",), spacings=("even",), intervals=(4, 6), orders=(2,)),
    Grid(caches=("taylor", "newton"), granularities=("block",), intervals=(4,), orders=(4,)),
    Grid(caches=("hermite",), granularities=("module", "model"), intervals=(4,), orders=(2,)),
    Grid(caches=("reuse",), granularities=("module", "model"), intervals=(4,)),
    Grid(caches=("delta-dit",), intervals=(2,), gates=(20, 30)),
    Grid(caches=("delta-dit",), intervals=(3,), gates=(30,)),
)

# Written down before the numbers of this benchmark, after trials of 66 to 100 images.
RULE = f"""\
Recommended is the fastest cached setting, by the median of the measured seconds, that is good enough and worth its
cache. Good enough: a mean FD at most {TOLERANCE:.0%} above that of 50 full steps, and at most one percentage
point fewer digits read as requested. Worth its cache: every uncached run that is as fast is further, by PSNR, from the
images of the 50 full steps. Settings within 5% of the fastest one's seconds count as equally fast; of those the
highest PSNR wins."""


@dataclass
class Args:
    """What to run and where."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    runs: Path = Path("exps/digits-benchmark")
    """Where the runs haste-seed0, ... and the classifier are, or go."""
    samples: int = 400
    """Images to sample of each point and seed."""
    batch: int = 100
    """Images per batch, in which they are also timed."""
    repeats: int = 2
    """How often each point of each seed is timed."""
    cfg_scale: float = 1.0
    """Classifier-free guidance, which doubles the work; 1 is none. Give another --output with it."""
    output: Path = HERE
    """Where results.json, results.md and results.png go."""
    plot_only: bool = False
    """Measure nothing: make the table and the plot from results.json."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        records = {seed: measure(args, seed) for seed in args.seeds}
        document = {"machine": describe_machine("cpu"), "records": {str(seed): own for seed, own in records.items()}}
        write_results(args.output, document)
    document = read_results(args.output)
    rows = average([make_rows(records) for records in document["records"].values()])
    guided = guidance(rows[0].settings.cfg_scale)
    title = f"Digits, SiT trained with HASTE, {guided}: mean over {len(document['records'])} seed(s)"
    plot_sweep(args.output / "results.png", rows, title=title, chosen=recommend(rows, TOLERANCE))
    text = write_up(document, rows)
    write_text(args.output / "results.md", text)
    print(text)


def measure(args: Args, seed: int) -> list[dict[str, Any]]:
    """The records of one seed's sweep, which are kept beside the runs."""
    run = trained_run(args.runs, seed)
    evaluator = Evaluator.load("digits", "digits", args.runs / "classifier", batch_size=64)
    folder = SweepDir(args.runs / f"sampling-seed{seed}")
    points = plan(replace(BASE, cfg_scale=args.cfg_scale), GRIDS, UNCACHED_STEPS)
    sweep = Sweep(load_checkpoint(run), points, evaluator, folder, args.samples, args.batch, args.repeats)
    with tqdm(total=sweep.images, unit="image", desc=f"seed {seed}") as bar:
        sweep.run(lambda name, images: bar.update(images))
    if sweep.skipped:
        raise SystemExit("\n".join(["no part of this benchmark may be skipped:", *sweep.skipped]))
    return folder.complete(sweep.shared)


def trained_run(runs: Path, seed: int, preset: str = "digits") -> Path:
    """The folder of a run of benchmarks/digits, trained first if it is not there, or not to its end."""
    name = f"{preset.removesuffix('digits')}haste-seed{seed}"
    config = TrainConfig.from_preset(preset, output_dir=str(runs), exp_name=name, seed=seed)
    last = runs / name / "checkpoints" / f"{config.max_train_steps:07d}.pt"
    return runs / name if last.is_file() else train_to_end(config)


def write_up(document: dict[str, Any], rows: list[Row]) -> str:
    """results.md."""
    machine, (first, *_) = document["machine"], next(iter(document["records"].values()))
    shared, seeds = first["sweep"], len(document["records"])
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["modified"] else "")
    described = (
        f"`python benchmarks/digits_sampling/run.py`. Mean over {seeds} seed(s) of training, ± the standard deviation; "
        f"{shared['samples']:,} images a point and seed, Euler steps, EMA weights, "
        f"{guidance(shared['settings']['cfg_scale'])}, the same noise and labels for all. The FD is in "
        f"{shared['evaluated_by']}; accuracy is how often the classifier reads the requested digit. Batches of "
        f"{shared['batch']}, each point timed {len(first['seconds'])} times a seed.\n\n"
        f"Commit {commit}; torch {machine['torch']}; {machine['processor']}, {machine['threads']} thread(s); no GPU."
    )
    numbers = ["![](results.png)", markdown_table(table(rows)).rstrip(), LEGEND]
    advice = ["## Recommendation", RULE, verdict(rows)]
    return "\n\n".join(["# Digits: cached sampling and fewer steps", described, *numbers, *advice]) + "\n"


def guidance(scale: float) -> str:
    return "no guidance" if scale == 1 else f"guidance {scale:g}"


def verdict(rows: list[Row]) -> str:
    """What the rule says, and what uncached sampling says to that."""
    chosen = recommend(rows, TOLERANCE)
    uncached = min(
        (row for row in rows if row.uncached and good_enough(row, rows[0], TOLERANCE)), key=lambda r: r.seconds
    )
    said = "No setting passes" if chosen is None else f"By this rule: {describe(chosen)}"
    return f"**{said}.** The fastest uncached run that is good enough: {describe(uncached)}."


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
