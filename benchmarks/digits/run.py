"""Vanilla SiT, REPA, HASTE and HASTE without stopping on the digits, three seeds each, at five points of training.

    python benchmarks/digits/run.py                            all that is not done yet, then the table and the plots
    python benchmarks/digits/run.py --methods HASTE --seeds 0  of that, one run; several may go on side by side
    python benchmarks/digits/run.py --plot-only                the table and the plots from results.json alone

All runs share the preset `haste train --preset digits`, its teacher, the classifier and the seeds of the samples; runs
of one seed also see the same order of images, times and noise. A run that is done is not done again.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import tyro
from haste.evaluation.checkpoints import CLASSIFIED_AT_ONCE, evaluate_checkpoints
from haste.evaluation.evaluate import Evaluator
from haste.generation.config import SamplingConfig
from haste.generation.loaded import run_checkpoints
from haste.io import write_text
from haste.plotting import plot_advantage, plot_scores
from haste.tables import format_number, markdown_table
from haste.training.config import TrainConfig

import haste_ext
from haste_ext.bench.measure import processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import read_results, train_to_end, write_results  # noqa: E402

HERE = Path(__file__).resolve().parent
SAMPLES = 1000
SETTINGS = SamplingConfig(num_steps=25, labels="balanced")

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"attn_coeff": 0.0, "proj_coeff": 0.0},
    "REPA": {"attn_coeff": 0.0, "early_stop_point": -1},
    "HASTE": {},
    "HASTE, never stopped": {"early_stop_point": -1},
}


@dataclass
class Args:
    """What to run and where."""

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Of: vanilla, REPA, HASTE, "HASTE, never stopped"."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    output_dir: Path = Path("exps/digits-benchmark")
    """Where the runs, the teacher and the classifier go."""
    plot_only: bool = False
    """Train nothing: make the table and the plots from results.json."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        for seed in args.seeds:
            for method in args.methods:
                do_run(args, method, seed)
    results = stored_results()
    write_table(results)
    write_plots(results)
    print((HERE / "results.md").read_text())


def stored_results() -> dict[str, Any]:
    """results.json, or what it is before the first run."""
    return read_results(HERE) if (HERE / "results.json").is_file() else {"runs": []}


def run_config(output_dir: Path, method: str, seed: int) -> TrainConfig:
    """The preset with the method's coefficients."""
    name = f"{method.lower().replace(', ', '-').replace(' ', '-')}-seed{seed}"
    return TrainConfig.from_preset("digits", output_dir=str(output_dir), exp_name=name, seed=seed, **METHODS[method])


def do_run(args: Args, method: str, seed: int) -> None:
    """Train and evaluate one run, unless it is in the results with these very settings; then write results.json."""
    config = run_config(args.output_dir, method, seed)
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    if any(run["settings"] == settings for run in stored_results()["runs"]):
        print(f"{method}, seed {seed}: done before")
        return
    run, evaluator, _ = train_and_score(config, args.output_dir / "classifier")
    run = {"method": method, "seed": seed, "settings": settings, **run}
    results = stored_results()  # again: another process may have added its own runs
    keep_run(results, run, list(METHODS))
    results["sampling"] = SETTINGS.sampling_fields()
    results["classifier"] = {
        "held_out_accuracy": evaluator.extractor.held_out_accuracy,
        "features": evaluator.reference.dimension,
        "real_digits": evaluator.reference.count,
        "split_half_fd": evaluator.split_half_fd,
        "settings": asdict(evaluator.extractor.settings),
    }
    write_results(HERE, results)


def train_and_score(config: TrainConfig, classifier: Path) -> tuple[dict[str, Any], Evaluator, Path]:
    """Train, and score every checkpoint: the scores with the seconds of both and what made them, with what they were
    scored, and the run's folder."""
    begin = perf_counter()
    folder = train_to_end(config)
    trained = perf_counter()
    evaluator = Evaluator.load("digits", "digits", classifier, CLASSIFIED_AT_ONCE)
    records = evaluate_checkpoints(folder, run_checkpoints(folder), SETTINGS, SAMPLES, evaluator)
    scores = {
        "points": [{name: record[name] for name in ("step", "fd", "label_accuracy", "samples")} for record in records],
        "train_seconds": round(trained - begin, 1),
        "evaluation_seconds": round(perf_counter() - trained, 1),
        **provenance(),
    }
    return scores, evaluator, folder


def keep_run(results: dict[str, Any], run: dict[str, Any], methods: Sequence[str]) -> None:
    """Put a run in the place of the one of its method and seed, in the order of the methods."""
    others = [old for old in results["runs"] if (old["method"], old["seed"]) != (run["method"], run["seed"])]
    results["runs"] = sorted([*others, run], key=lambda run: (list(methods).index(run["method"]), run["seed"]))


def provenance() -> dict[str, Any]:
    """The commit (with a mark if the code that runs differs from it), versions, and the machine."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout

    code = (":/python", ":/haste_ext", ":/csrc", ":/benchmarks/digits/*.py")
    changed = git("status", "--porcelain", "--", *code).strip()
    return {
        "commit": git("rev-parse", "HEAD").strip() + (" with changes" if changed else ""),
        "build": haste_ext.build_info(),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def by_method(results: dict[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Method → seed → points."""
    scores: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for run in results["runs"]:
        scores.setdefault(run["method"], {})[run["seed"]] = run["points"]
    return scores


def write_table(results: dict[str, Any]) -> None:
    """results.md: mean ± standard deviation over seeds (n − 1) of both numbers at every point."""
    scores = by_method(results)
    steps = [point["step"] for point in next(iter(next(iter(scores.values())).values()))]
    head = ["", *(f"step {step:,}" for step in steps)]
    lines = ["# Digits: vanilla SiT, REPA, HASTE\n", describe(results)]
    for title, key, scale, digits in (
        ("FD", "fd", 1.0, 2),
        ("Label accuracy, %", "label_accuracy", 100.0, 1),
    ):
        rows = []
        for method, seeds in scores.items():
            values = scale * np.array([[point[key] for point in points] for points in seeds.values()])
            means, spreads = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None
            pairs = zip(means, [None] * len(means) if spreads is None else spreads, strict=True)
            rows.append([method, *(format_number(mean, digits, spread=spread) for mean, spread in pairs)])
        lines.append(f"\n## {title}\n\n{markdown_table([head, *rows])}".rstrip())
    write_text(HERE / "results.md", "\n".join(lines) + "\n")


def describe(results: dict[str, Any]) -> str:
    """How the numbers came about, in words."""
    classifier, run, sampling = results["classifier"], results["runs"][0], SamplingConfig(**results["sampling"])
    seeds = sorted({run["seed"] for run in results["runs"]})
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in results["runs"]})
    haste = [run["settings"] for run in results["runs"] if run["method"] == "HASTE"]
    stop = f"Alignment ends at step {haste[0]['early_stop_point']:,} in HASTE. " if haste else ""
    points = run["points"][0]["samples"]
    return (
        f"`python benchmarks/digits/run.py`. Mean ± standard deviation over {len(seeds)} seeds; {points:,} samples a "
        f"point, {sampling.describe()}, EMA weights, no guidance, the same noise and labels for every run. {stop}"
        f"FD to {classifier['real_digits']:,} real digits in {classifier['features']} features of a classifier that no "
        f"run has seen (it reads {classifier['held_out_accuracy']:.1%} of the digits it has not seen; two halves of "
        f"the real digits are {classifier['split_half_fd']:.2f} apart).\n\n"
        f"Commit {', '.join(commits)}; torch {run['build']['torch_loaded']}; {run['processor']}, "
        f"{run['threads']} thread(s); no GPU."
    )


def write_plots(results: dict[str, Any]) -> None:
    """results.png: both numbers over steps, mean and range over seeds; advantage.png: the same against vanilla SiT."""
    scores = by_method(results)
    stops = {run["settings"]["early_stop_point"] for run in results["runs"] if run["method"] == "HASTE"}
    stop = stops.pop() if stops else None
    title = f"Digits, {len({run['seed'] for run in results['runs']})} seeds: mean, lowest and highest"
    plot_scores(HERE / "results.png", scores, title=title, stop=stop)
    if "vanilla" in scores:
        plot_advantage(HERE / "advantage.png", scores, "vanilla", title=title, stop=stop)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
