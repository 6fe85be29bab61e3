"""Vanilla SiT, REPA, HASTE and HASTE without stopping on the digits, three seeds each, at five points of training.

    python benchmarks/digits/run.py                            all that is not done yet, then the table and the plots
    python benchmarks/digits/run.py --model dit                the same of DiT, with SiT's numbers beside
    python benchmarks/digits/run.py --methods HASTE --seeds 0  of that, one run; several may go on side by side
    python benchmarks/digits/run.py --plot-only                the table and the plots from the JSON alone

All runs of a model share its preset (digits, dit-digits), the teacher, the classifier and the seeds of the samples;
runs of one seed also see the same order of images, times and noise. A run that is done is not done again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from haste.evaluation.checkpoints import CLASSIFIED_AT_ONCE, evaluate_checkpoints
from haste.generation.config import SamplingConfig
from haste.generation.loaded import run_checkpoints
from haste.io import write_text
from haste.metrics.evaluator import Evaluator
from haste.plotting import plot_advantage, plot_scores
from haste.tables import format_number, markdown_table
from haste.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import provenance, read_results, train_to_end, write_results  # noqa: E402

HERE = Path(__file__).resolve().parent
SAMPLES = 1000
SETTINGS = SamplingConfig(num_steps=25, mode="ode", labels="balanced")


class Benchmark(NamedTuple):
    """A model's. stored: the name of its JSON, table and plot. advantage: that of the plot against vanilla runs."""

    title: str
    preset: str
    settings: SamplingConfig
    stored: str
    advantage: str | None = None


MODELS = {
    "sit": Benchmark("SiT", "digits", SETTINGS, "results", "advantage"),
    "dit": Benchmark("DiT", "dit-digits", replace(SETTINGS, mode="ddim"), "dit"),
}

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"attn_coeff": 0.0, "proj_coeff": 0.0},
    "REPA": {"attn_coeff": 0.0, "early_stop_point": -1},
    "HASTE": {},
    "HASTE, never stopped": {"early_stop_point": -1},
}


@dataclass
class Args:
    """What to run and where."""

    model: Literal["sit", "dit"] = "sit"
    """SiT, which predicts a velocity, or DiT, which predicts noise."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Of: vanilla, REPA, HASTE, "HASTE, never stopped"."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    output_dir: Path = Path("exps/digits-benchmark")
    """Where the runs, the teacher and the classifier go."""
    plot_only: bool = False
    """Train nothing: make the table and the plots from the JSON."""

    @property
    def benchmark(self) -> Benchmark:
        return MODELS[self.model]


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        for seed in args.seeds:
            for method in args.methods:
                do_run(args, method, seed)
    results = stored_results(args.benchmark)
    text = write_up(args.benchmark, results)
    write_text(HERE / f"{args.benchmark.stored}.md", text)
    write_plots(args.benchmark, results)
    print(text)


def stored_results(benchmark: Benchmark) -> dict[str, Any]:
    """The JSON, or what it is before the first run."""
    name = f"{benchmark.stored}.json"
    return read_results(HERE, name) if (HERE / name).is_file() else {"runs": []}


def run_config(args: Args, method: str, seed: int) -> TrainConfig:
    """The preset with the method's coefficients."""
    begin = "" if args.model == "sit" else f"{args.model}-"
    name = f"{begin}{method.lower().replace(', ', '-').replace(' ', '-')}-seed{seed}"
    settings = {"output_dir": str(args.output_dir), "exp_name": name, "seed": seed, **METHODS[method]}
    return TrainConfig.from_preset(args.benchmark.preset, **settings)


def do_run(args: Args, method: str, seed: int) -> None:
    """Train and evaluate one run, unless it is in the results with these very settings; then write the JSON."""
    config, benchmark = run_config(args, method, seed), args.benchmark
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    if any(run["settings"].items() <= settings.items() for run in stored_results(benchmark)["runs"]):
        print(f"{method}, seed {seed}: done before")
        return
    run, evaluator, _ = train_and_score(config, args.output_dir / "classifier", benchmark.settings)
    run = {"method": method, "seed": seed, "settings": settings, **run}
    results = stored_results(benchmark)  # again: another process may have added its own runs
    keep_run(results, run, list(METHODS))
    results["sampling"] = benchmark.settings.sampling_fields()
    results["classifier"] = {
        "held_out_accuracy": evaluator.extractor.held_out_accuracy,
        "features": evaluator.reference.dimension,
        "real_digits": evaluator.reference.count,
        "split_half_fd": evaluator.split_half_fd,
        "settings": asdict(evaluator.extractor.settings),
    }
    write_results(HERE, results, f"{benchmark.stored}.json")


def train_and_score(
    config: TrainConfig, classifier: Path, settings: SamplingConfig = SETTINGS
) -> tuple[dict[str, Any], Evaluator, Path]:
    """Train, and score every checkpoint: the scores with the seconds of both and what made them, with what they were
    scored, and the run's folder."""
    begin = perf_counter()
    folder = train_to_end(config)
    trained = perf_counter()
    evaluator = Evaluator.load("digits", "digits", classifier, CLASSIFIED_AT_ONCE)
    records = evaluate_checkpoints(folder, run_checkpoints(folder), settings, SAMPLES, evaluator)
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


def by_method(results: dict[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Method → seed → points."""
    scores: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for run in results["runs"]:
        scores.setdefault(run["method"], {})[run["seed"]] = run["points"]
    return scores


def write_up(benchmark: Benchmark, results: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds (n − 1) of both numbers at every point; SiT's are beside those of others."""
    beside = MODELS["sit"]
    tables = {"": by_method(results)}
    if benchmark != beside:
        tables = {f"{benchmark.title}, ": tables[""], f"{beside.title}, ": by_method(stored_results(beside))}
    lines = [f"# Digits: vanilla {benchmark.title}, REPA, HASTE\n", describe(benchmark, results)]
    steps = [point["step"] for point in results["runs"][0]["points"]]
    head = ["", *(f"step {step:,}" for step in steps)]
    for title, key, scale, digits in (
        ("FD", "fd", 1.0, 2),
        ("Label accuracy, %", "label_accuracy", 100.0, 1),
    ):
        rows = [
            [f"{model}{method}", *cells(seeds, key, scale, digits)]
            for model, methods in tables.items()
            for method, seeds in methods.items()
        ]
        lines.append(f"\n## {title}\n\n{markdown_table([head, *rows])}".rstrip())
    return "\n".join(lines) + "\n"


def cells(seeds: dict[int, list[dict[str, Any]]], key: str, scale: float, digits: int) -> list[str]:
    """Of one method, at every point."""
    values = scale * np.array([[point[key] for point in points] for points in seeds.values()])
    means, spreads = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else [None] * values.shape[1]
    return [format_number(mean, digits, spread=spread) for mean, spread in zip(means, spreads, strict=True)]


def describe(benchmark: Benchmark, results: dict[str, Any]) -> str:
    """How the numbers came about, in words."""
    flag = "" if benchmark == MODELS["sit"] else f" --model {benchmark.title.lower()}"
    of_sit = {run["seed"] for run in stored_results(MODELS["sit"])["runs"]}
    beside = f"SiT's rows are those of [results.md](results.md), {len(of_sit)} seeds after as many images. "
    beside = beside if flag else ""
    classifier, run, sampling = results["classifier"], results["runs"][0], SamplingConfig(**results["sampling"])
    seeds = sorted({run["seed"] for run in results["runs"]})
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in results["runs"]})
    haste = [run["settings"] for run in results["runs"] if run["method"] == "HASTE"]
    stop = f"Alignment ends at step {haste[0]['early_stop_point']:,} in HASTE. " if haste else ""
    points = run["points"][0]["samples"]
    return (
        f"`python benchmarks/digits/run.py{flag}`. Mean ± standard deviation over {len(seeds)} seeds; {points:,} "
        f"samples a point, {sampling.describe()}, EMA weights, no guidance, the same noise and labels for every run. "
        f"{stop}{beside}"
        f"FD to {classifier['real_digits']:,} real digits in {classifier['features']} features of a classifier that no "
        f"run has seen (it reads {classifier['held_out_accuracy']:.1%} of the digits it has not seen; two halves of "
        f"the real digits are {classifier['split_half_fd']:.2f} apart).\n\n"
        f"Commit {', '.join(commits)}; torch {run['build']['torch_loaded']}; {run['processor']}, "
        f"{run['threads']} thread(s); no GPU."
    )


def write_plots(benchmark: Benchmark, results: dict[str, Any]) -> None:
    """Both numbers over steps, mean and range over seeds; and, where the model has that plot, the same against the
    vanilla model."""
    scores = by_method(results)
    stops = {run["settings"]["early_stop_point"] for run in results["runs"] if run["method"] == "HASTE"}
    stop = stops.pop() if stops else None
    of = "" if benchmark == MODELS["sit"] else f"{benchmark.title} on "
    title = f"{of}digits, {len({run['seed'] for run in results['runs']})} seeds: mean, lowest and highest"
    title = title[0].upper() + title[1:]
    plot_scores(HERE / f"{benchmark.stored}.png", scores, title=title, stop=stop)
    if "vanilla" in scores and benchmark.advantage is not None:
        plot_advantage(HERE / f"{benchmark.advantage}.png", scores, "vanilla", title=title, stop=stop)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
