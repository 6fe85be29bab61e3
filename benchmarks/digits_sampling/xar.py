"""Sampling from xAR on the digits: fewer steps, step annealing, forecasts, staggered cells; quality, seconds, rounds.

    python benchmarks/digits_sampling/xar.py              all that is not measured yet, then the table
    python benchmarks/digits_sampling/xar.py --seeds 0    of that, one seed
    python benchmarks/digits_sampling/xar.py --timing     seconds of every setting, in turns; on an idle machine
    python benchmarks/digits_sampling/xar.py --plot-only  the table from xar.json alone

The models are the vanilla xAR of benchmarks/digits/xar.py, seeds 0, 1 and 2, which trains them first. All settings of a
seed start from the same noise. Full is 50 steps for each of 4 cells, one after the other. PSNR is the median over the
images against the full run; the SDE of another number of steps has other noise, so there is none.
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import tyro
from haste.evaluation.checkpoints import CLASSIFIED_AT_ONCE
from haste.evaluation.fidelity import compare_images
from haste.generation.config import SamplingConfig
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
from haste.generation.pipeline import Sampler
from haste.io import write_text
from haste.metrics.evaluator import Evaluator
from haste.tables import format_number, markdown_table
from tqdm import tqdm

from haste_ext.bench.measure import describe_machine

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "xar.json", HERE / "xar.md"
MODES = ("ode", "sde")

FULL = SamplingConfig(labels="balanced")
FORECAST: dict[str, Any] = {
    "cache": "newton", "granularity": "output", "spacing": "even", "interval": 4, "order": 1,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "25 steps": {"num_steps": 25},
    "13 steps": {"num_steps": 13},
    "annealing 50, 38, 26, 15": {"cell_steps": "50,38,26,15"},
    "forecast": FORECAST,
    "--fast": FORECAST | {"interval": 6, "order": 2},
    "annealing and forecast": {"cell_steps": "50,38,26,15", **FORECAST},
    "stagger 25": {"stagger": 25},
    "stagger 12": {"stagger": 12},
    "stagger 6": {"stagger": 6},
    "stagger 0": {"stagger": 0},
    "stagger 12 and forecast": {"stagger": 12, **FORECAST},
    "stagger 8 and forecast": {"stagger": 8, **FORECAST},
    "stagger 6 and forecast": {"stagger": 6, **FORECAST},  # no multiple of the interval
    "stagger 4 and forecast": {"stagger": 4, **FORECAST},
}


@dataclass
class Args:
    """What to run and where."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    runs: Path = Path("exps/digits-xar")
    """Where the runs xar-seed0, ... and the classifier are."""
    samples: int = 400
    """Images of each setting and seed."""
    batch: int = 100
    """Images at once."""
    timing: bool = False
    """Measure seconds, of seed 0, and nothing else."""
    rounds: int = 5
    """Turns of --timing."""
    timed_batches: list[int] = field(default_factory=lambda: [1, 100])
    """Images at once in --timing."""
    plot_only: bool = False
    """Measure nothing: make the table from xar.json."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.timing:
        write({**read(), "timing": measure_seconds(args)})
    elif not args.plot_only:
        for seed in args.seeds:
            measure(args, seed)
    write_text(TABLE, write_up(read()))
    print(TABLE.read_text())


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"seeds": {}}


def write(document: dict[str, Any]) -> None:
    write_text(RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load(args: Args, seed: int) -> LoadedCheckpoint:
    return load_checkpoint(args.runs / f"xar-seed{seed}", device="cpu")


def points() -> list[tuple[str, str, SamplingConfig]]:
    """Mode, name, settings; the full run of a mode first."""
    made = []
    for mode, (name, own) in itertools.product(MODES, SETTINGS.items()):
        of_mode = {"order": 1} if name == "--fast" and mode == "sde" else {}  # as --fast has it
        made.append((mode, name, replace(FULL, **{"mode": mode, **own, **of_mode})))
    return made


def same_noise(settings: SamplingConfig) -> bool:
    """Whether a run has the noise of the full one."""
    return settings.mode == "ode" or (settings.num_steps == FULL.num_steps and not settings.cell_steps)


# ---- quality ----


def measure(args: Args, seed: int) -> None:
    """Measure the settings that xar.json lacks, and write each."""
    evaluator = Evaluator.load("digits", "digits", args.runs / "classifier", CLASSIFIED_AT_ONCE)
    sampler = Sampler(load(args, seed), FULL)
    full: dict[str, np.ndarray] = {}
    for mode, name, settings in tqdm(points(), unit="setting", desc=f"seed {seed}"):
        known = read()["seeds"].get(str(seed), {})
        if f"{mode}: {name}" in known and known[f"{mode}: {name}"]["samples"] == args.samples:
            continue
        if mode not in full:
            full[mode] = sampler.with_settings(replace(FULL, mode=mode)).sample_batches(args.samples, args.batch)[0]
        own = sampler.with_settings(settings)
        begin = perf_counter()
        images, labels = own.sample_batches(args.samples, args.batch)
        seconds = perf_counter() - begin
        scores = evaluator.values(evaluator.extractor(images), labels, ("fd", "label_accuracy"))
        calls, evaluated = own.calls
        psnr = None if name == "full" or not same_noise(settings) else compare_images(images, full[mode]).psnr
        record = {
            **scores,
            "psnr": None if psnr is None else round(float(np.median(psnr)), 2),
            "rounds": calls,
            "evaluations": evaluated,
            "samples": args.samples,
            "seconds_while_measuring": round(seconds, 2),
        }
        document = read()  # again: another process may have added its own seed
        document["machine"] = describe_machine("cpu")
        document["seeds"].setdefault(str(seed), {})[f"{mode}: {name}"] = record
        write(document)


# ---- seconds ----


def measure_seconds(args: Args) -> dict[str, Any]:
    """Seconds of a whole run, the median of the turns, by batch."""
    start = Sampler(load(args, 0), FULL)
    timed = [(f"{mode}: {name}", start.with_settings(settings)) for mode, name, settings in points() if mode == "ode"]
    seconds: dict[str, dict[str, list[float]]] = {}
    for batch, turn in itertools.product(args.timed_batches, range(args.rounds)):
        for name, sampler in timed:
            if turn == 0:
                sampler.warm_up(batch)
            noise = sampler.start_of(range(batch))
            begin = perf_counter()
            sampler.run(noise)
            seconds.setdefault(str(batch), {}).setdefault(name, []).append(perf_counter() - begin)
    medians = {batch: {name: round(median(own), 4) for name, own in by.items()} for batch, by in seconds.items()}
    return {"seconds": medians, "rounds": args.rounds, "machine": describe_machine("cpu")}


# ---- the table ----


def write_up(document: dict[str, Any]) -> str:
    seeds, timing = document["seeds"], document.get("timing")
    if not seeds:
        return "Nothing is measured yet.\n"
    machine, one = document["machine"], next(iter(next(iter(seeds.values())).values()))
    batches = list(timing["seconds"]) if timing else []
    rows = [["", "rounds", "of them evaluated", "FD", "label accuracy, %", "PSNR, dB",
             *(f"× faster, batch {batch}" for batch in batches)]]  # fmt: skip
    for mode, name, _ in points():
        records = [own[f"{mode}: {name}"] for own in seeds.values() if f"{mode}: {name}" in own]
        if not records:
            continue
        psnrs = [record["psnr"] for record in records if record["psnr"] is not None]
        row = [f"{mode.upper()}: {name}", str(records[0]["rounds"]), str(records[0]["evaluations"])]
        row += [spread([r["fd"] for r in records], 2), spread([100 * r["label_accuracy"] for r in records], 1)]
        row.append(spread(psnrs, 1) if psnrs else "")
        for batch in batches:
            own = timing["seconds"][batch]
            row.append(f"{own['ode: full'] / own[f'{mode}: {name}']:.2f}" if f"{mode}: {name}" in own else "")
        rows.append(row)
    lines = [
        "# Digits: sampling from xAR\n",
        f"`python benchmarks/digits_sampling/xar.py`. Mean ± standard deviation over {len(seeds)} seed(s) of "
        f"training, {one['samples']} images each, no guidance; PSNR is the median over the images against the full run "
        f"of the same noise. Torch {machine['torch']}, {machine['processor']}, {machine['threads']} thread(s).",
    ]
    if timing:
        full = ", ".join(f"{by['ode: full']:.2f} s at batch {batch}" for batch, by in timing["seconds"].items())
        lines.append(
            f"Seconds of the ODE: `--timing`, the median of {timing['rounds']} turns. The full run takes {full}."
        )
    return "\n".join([*lines, "", markdown_table(rows).rstrip()]) + "\n"


def spread(values: list[float], digits: int) -> str:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return format_number(mean(values), digits, spread=deviation)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
