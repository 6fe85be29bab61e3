"""xAR beside SiT on the digits: equal parameters, equal training seconds, three seeds, five points of training.

    python benchmarks/digits/xar.py --timing         seconds of a step of each method, in turns, on an idle machine
    python benchmarks/digits/xar.py                  all runs that are not done yet, then the table
    python benchmarks/digits/xar.py --methods xAR --seeds 0  of that, one run; several may go on side by side
    python benchmarks/digits/xar.py --plot-only      the table from xar.json alone

The budget is what 1,000 steps of vanilla SiT take; the other methods get as many steps as fit into it by the seconds
that --timing measured, and HASTE's ends alignment after half of its steps. So seconds are counted as on an idle
machine, whatever else runs on it meanwhile. Teachers are trained before, and do not count. A run that is done is not
done again.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import tyro
from haste.generation.loaded import load_checkpoint
from haste.io import write_text
from haste.tables import format_number, markdown_table
from haste.training.config import TrainConfig

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _common import provenance, train_to_end  # noqa: E402
from run import SETTINGS, keep_run, train_and_score  # noqa: E402

RESULTS, TABLE = HERE / "xar.json", HERE / "xar.md"
BASELINE, BASELINE_STEPS = "SiT", 1000
POINTS = 5
TIMED_STEPS, TIMED_ROUNDS = 40, 3

VANILLA: dict[str, Any] = {"attn_coeff": 0.0, "proj_coeff": 0.0}
REPA: dict[str, Any] = {"attn_coeff": 0.0}


class Method(NamedTuple):
    """changes: to the preset. Until the end of alignment a step is timed with them, afterwards it is that of `after`;
    None aligns to the end."""

    preset: str
    changes: dict[str, Any]
    after: str | None = None


METHODS = {
    "SiT": Method("digits", VANILLA),
    "SiT, HASTE": Method("digits", {}, "SiT"),
    "xAR": Method("xar-digits", VANILLA),
    "xAR, REPA": Method("xar-digits", REPA),
    "xAR, HASTE": Method("xar-digits", {}, "xAR"),
}


@dataclass
class Args:
    """What to run and where."""

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Of: SiT; SiT, HASTE; xAR; xAR, REPA; xAR, HASTE."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    output_dir: Path = Path("exps/digits-xar")
    """Where the runs, the teacher and the classifier go."""
    timing: bool = False
    """Measure the seconds of a training step, and nothing else."""
    plot_only: bool = False
    """Train nothing: make the table from xar.json."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.timing:
        write({**read(), "timing": measure_steps(args)})
    elif not args.plot_only:
        for seed in args.seeds:
            for method in args.methods:
                do_run(args, method, seed)
    write_text(TABLE, write_up(read()))
    print(TABLE.read_text())


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}


def write(document: dict[str, Any]) -> None:
    write_text(RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


# ---- how many steps ----


def measure_steps(args: Args) -> dict[str, Any]:
    """Seconds of a training step of each method while it aligns: runs in turns, the median over windows of ten steps,
    without the first window of each run."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(TIMED_ROUNDS):
        for name, method in METHODS.items():
            config = TrainConfig.from_preset(
                method.preset, output_dir=str(args.output_dir), exp_name="timing", max_train_steps=TIMED_STEPS,
                sampling_steps=0, **{**method.changes, "early_stop_point": -1},
            )  # fmt: skip
            shutil.rmtree(args.output_dir / "timing", ignore_errors=True)
            lines = (train_to_end(config) / "log.jsonl").read_text().splitlines()
            rates = [json.loads(line)["images_per_second"] for line in lines[1:]]
            seconds[name] += [config.batch_size / rate for rate in rates]
    shutil.rmtree(args.output_dir / "timing", ignore_errors=True)
    return {"seconds": {name: round(median(own), 4) for name, own in seconds.items()}, **provenance()}


def steps_of(method: str, seconds: dict[str, float]) -> int:
    """The steps that fit into the budget, a multiple of ten for each point."""
    after = METHODS[method].after
    step = seconds[method] if after is None else mean([seconds[method], seconds[after]])
    return round(BASELINE_STEPS * seconds[BASELINE] / step / (10 * POINTS)) * 10 * POINTS


def run_config(args: Args, method: str, seed: int, steps: int) -> TrainConfig:
    changes = METHODS[method].changes | {
        "early_stop_point": steps // 2 if METHODS[method].after is not None else -1,
        "max_train_steps": steps,
        "checkpointing_steps": steps // POINTS,
        "sampling_steps": 0,
    }
    name = f"{method.lower().replace(', ', '-')}-seed{seed}"
    preset = METHODS[method].preset
    return TrainConfig.from_preset(preset, output_dir=str(args.output_dir), exp_name=name, seed=seed, **changes)


# ---- runs ----


def do_run(args: Args, method: str, seed: int) -> None:
    """Train and evaluate one run, unless it is in the results with these very settings; then write xar.json."""
    seconds = read()["timing"]["seconds"]
    config = run_config(args, method, seed, steps_of(method, seconds))
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    if any(run["settings"] == settings for run in read()["runs"]):
        print(f"{method}, seed {seed}: done before")
        return
    run, evaluator, folder = train_and_score(config, args.output_dir / "classifier")
    run = {"method": method, "seed": seed, "settings": settings, "parameters": parameters(folder), **run}
    results = read()  # again: another process may have added its own runs
    keep_run(results, run, list(METHODS))
    results["split_half_fd"] = evaluator.split_half_fd
    write(results)


def parameters(folder: Path) -> int:
    """Of the model of a run, without projectors."""
    weights = load_checkpoint(folder, device="cpu").model.named_parameters()
    return sum(weight.numel() for name, weight in weights if not name.startswith("projectors"))


# ---- the table ----


def write_up(document: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds (n − 1) of both numbers, at equal shares of the budget."""
    if not document["runs"]:
        return f"{describe_timing(document['timing'])}\n"
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in document["runs"]:
        runs.setdefault(run["method"], []).append(run)
    shares = [f"{100 * (point + 1) // POINTS}%" for point in range(POINTS)]
    lines = ["# Digits: SiT and xAR at equal training seconds\n", describe(document, runs)]
    for title, key, scale, digits in (("FD", "fd", 1.0, 2), ("Label accuracy, %", "label_accuracy", 100.0, 1)):
        rows = [["", "steps", *shares]]
        for method, own in runs.items():
            values = scale * np.array([[point[key] for point in run["points"]] for run in own])
            spreads = values.std(axis=0, ddof=1) if len(own) > 1 else [None] * POINTS
            cells = [format_number(m, digits, spread=s) for m, s in zip(values.mean(axis=0), spreads, strict=True)]
            rows.append([method, f"{own[0]['points'][-1]['step']:,}", *cells])
        lines.append(f"\n## {title}\n\n{markdown_table(rows)}".rstrip())
    return "\n".join(lines) + "\n"


def describe(document: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    """How the numbers came about, in words."""
    some, seeds = document["runs"][0], {run["seed"] for run in document["runs"]}
    sizes = {method.partition(",")[0]: own[0]["parameters"] for method, own in runs.items()}
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in document["runs"]})
    named = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
    return (
        f"`python benchmarks/digits/xar.py`. Mean ± standard deviation over {len(seeds)} seed(s);"
        f" {some['points'][0]['samples']:,} samples a point, {SETTINGS.num_steps} Euler steps (of each cell: xAR "
        f"makes 4 cells of 2 x 2 tokens, one after the other), EMA weights, no guidance. Parameters: {named}. Columns "
        f"are shares of the seconds that {BASELINE_STEPS:,} steps of vanilla SiT take. "
        f"{describe_timing(document['timing'])} HASTE ends alignment after half of its steps. Two halves of the real "
        f"digits have an FD of {document['split_half_fd']:.2f}.\n\nCommit {', '.join(commits)}; torch "
        f"{some['build']['torch_loaded']}; {some['processor']}, {some['threads']} thread(s); no GPU."
    )


def describe_timing(timing: dict[str, Any]) -> str:
    steps = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in timing["seconds"].items())
    return f"A step while it aligns takes, in ms: {steps} (alone on the machine, in turns, batch 64)."


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
