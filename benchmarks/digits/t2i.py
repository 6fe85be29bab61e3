"""Text to image on the digits: baseline, REPA and HASTE on MM-DiT, three seeds each, at five points of training.

    python benchmarks/digits/t2i.py                            all that is not done yet, then the table and the plot
    python benchmarks/digits/t2i.py --methods HASTE --seeds 0  of that, one run; several may go on side by side
    python benchmarks/digits/t2i.py --plot-only                the table and the plot from t2i.json alone

All runs share the preset `haste train --preset t2i-digits`, its captions, text encoder and teacher, the reader and the
noise of the samples; runs of one seed also see the same order of images and captions, times and noise. Prompts are all
wordings of the 40 combinations of digit, slant and weight, ten of which no training has seen. A run that is done is not
done again.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from haste.evaluation.checkpoints import CLASSIFIED_AT_ONCE, evaluate_checkpoints
from haste.generation.config import SamplingConfig
from haste.generation.loaded import run_checkpoints
from haste.io import write_text
from haste.metrics.evaluator import Evaluator
from haste.plotting import LIGHT, heading, save, styled
from haste.tables import format_number, markdown_table
from haste.training.config import TrainConfig
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _common import provenance, train_to_end  # noqa: E402
from run import keep_run  # noqa: E402

RESULTS, TABLE, PLOT = (HERE / f"t2i.{kind}" for kind in ("json", "md", "png"))
PRESET, DATA = "t2i-digits", "digits-captions"
SAMPLES = 480  # each of the 160 prompts three times
SETTINGS = SamplingConfig(num_steps=25, mode="ode", cfg_scale=2.0)

METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"attn_coeff": 0.0, "proj_coeff": 0.0},
    "REPA": {"attn_coeff": 0.0, "early_stop_point": -1},
    "HASTE": {},
}

# Titles of the tables and panels, and what they show of a point.
SCORES = {
    "FD": ("fd", 1.0, 2),
    "All three read as asked for, %": ("seen_all", 100.0, 1),
    "All three, of held-out combinations, %": ("held_out_all", 100.0, 1),
}
PARTS = ("digit", "slant", "weight")


@dataclass
class Args:
    """What to run and where."""

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Of: baseline, REPA, HASTE."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    output_dir: Path = Path("exps/digits-t2i")
    """Where the runs, the encoder, the teacher and the classifier go."""
    plot_only: bool = False
    """Train nothing: make the table and the plot from t2i.json."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        for seed in args.seeds:
            for method in args.methods:
                do_run(args, method, seed)
    document = read()
    write_text(TABLE, write_up(document))
    plot(document)
    print(TABLE.read_text())


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}


# ---- runs ----


def run_config(args: Args, method: str, seed: int) -> TrainConfig:
    """The preset with the method's coefficients."""
    changes = {**METHODS[method], "sampling_steps": 0, "exp_name": f"{method.lower()}-seed{seed}", "seed": seed}
    return TrainConfig.from_preset(PRESET, output_dir=str(args.output_dir), **changes)


def do_run(args: Args, method: str, seed: int) -> None:
    """Train and evaluate one run, unless it is in the results with these very settings; then write t2i.json."""
    config = run_config(args, method, seed)
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    if any(run["settings"] == settings for run in read()["runs"]):
        print(f"{method}, seed {seed}: done before")
        return
    folder = train_to_end(config)
    evaluator = Evaluator.load(DATA, DATA, args.output_dir / "classifier", CLASSIFIED_AT_ONCE)
    records = evaluate_checkpoints(folder, run_checkpoints(folder), SETTINGS, SAMPLES, evaluator)
    run = {
        "method": method,
        "seed": seed,
        "settings": settings,
        "points": [{"step": point["step"], "fd": point["fd"], **point["read"]} for point in records],
        "samples": SAMPLES,
        **provenance(),
    }
    results = read()  # again: another process may have added its own runs
    keep_run(results, run, list(METHODS))
    results["split_half_fd"] = evaluator.split_half_fd
    write_text(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


# ---- the table and the plot ----


def by_method(document: dict[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """The points of every seed, by method."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for run in document["runs"]:
        found.setdefault(run["method"], []).append(run["points"])
    return found


def values_of(runs: Sequence[Sequence[dict[str, Any]]], key: str, scale: float) -> np.ndarray:
    """One score, (seeds, points)."""
    return scale * np.array([[point[key] for point in points] for points in runs])


def cells(values: np.ndarray, digits: int) -> list[str]:
    """Mean ± standard deviation (n − 1) over seeds, of every column."""
    spreads = values.std(axis=0, ddof=1) if len(values) > 1 else [None] * values.shape[1]
    return [format_number(m, digits, spread=s) for m, s in zip(values.mean(axis=0), spreads, strict=True)]


def write_up(document: dict[str, Any]) -> str:
    """The scores at every point, and the parts of a prompt at the end."""
    runs = by_method(document)
    steps = [point["step"] for point in next(iter(runs.values()))[0]]
    lines = ["# Digits: text to image with MM-DiT, baseline, REPA, HASTE\n", describe(document)]
    for title, (key, scale, digits) in SCORES.items():
        rows = [["", *(f"step {step:,}" for step in steps)]]
        rows += [[method, *cells(values_of(own, key, scale), digits)] for method, own in runs.items()]
        lines.append(f"\n## {title}\n\n{markdown_table(rows)}".rstrip())
    keys = [f"{kind}_{part}" for kind in ("seen", "held_out") for part in PARTS]
    rows = [["", *(key.replace("seen_", "").replace("held_out_", "held out: ") for key in keys)]]
    for method, own in runs.items():
        ends = [[points[-1] for points in own]]
        rows.append([method, *(cells(values_of(ends, key, 100.0).T, 1)[0] for key in keys)])
    lines.append(f"\n## Parts of the prompts at step {steps[-1]:,}, %\n\n{markdown_table(rows)}".rstrip())
    return "\n".join(lines) + "\n"


def describe(document: dict[str, Any]) -> str:
    """How the numbers came about, in words."""
    some = document["runs"][0]
    seeds = {run["seed"] for run in document["runs"]}
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in document["runs"]})
    taus = {run["settings"]["early_stop_point"] for run in document["runs"] if run["method"] == "HASTE"}
    stop = f"Alignment ends at step {taus.pop():,} in HASTE. " if taus else ""
    return (
        f"`python benchmarks/digits/t2i.py`. Mean ± standard deviation over {len(seeds)} seed(s); {some['samples']:,} "
        f"samples a point, of each of the 160 prompts as many, {SETTINGS.describe()}, EMA weights, the same noise for "
        f"every run. {stop}Digits are read by the classifier, slant and weight by measurement. Two halves of the real "
        f"digits have an FD of {document['split_half_fd']:.2f}.\n\nCommit {', '.join(commits)}; torch "
        f"{some['build']['torch_loaded']}; {some['processor']}, {some['threads']} thread(s); no GPU."
    )


def plot(document: dict[str, Any]) -> None:
    """t2i.png: a panel for each score, mean and range over seeds."""
    runs = by_method(document)
    with styled(LIGHT):
        figure, panels = plt.subplots(1, len(SCORES), figsize=(15.0, 3.8))
        for axes, (title, (key, scale, _)) in zip(panels, SCORES.items(), strict=True):
            for colour, (method, own) in zip(LIGHT.series, runs.items(), strict=False):
                steps, values = [point["step"] for point in own[0]], values_of(own, key, scale)
                axes.plot(steps, values.mean(axis=0), color=colour, marker="o", markersize=4.5, label=method)
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0)
            axes.set(title=title.removesuffix(", %"), xlabel="Training step", xlim=(0, None))
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].legend()
        heading(figure, f"Text to image on the digits, {max(map(len, runs.values()))} seeds: mean, lowest and highest")
        figure.tight_layout()
        save(figure, PLOT)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
