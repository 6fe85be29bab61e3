"""Forecasts of a DiT under DDIM and DDPM on the digits: PSNR with the run that computes every step.

    python benchmarks/digits_sampling/dit.py               what is not measured yet, then the tables
    python benchmarks/digits_sampling/dit.py --seeds 0     of that, one seed
    python benchmarks/digits_sampling/dit.py --plot-only   the tables from dit.json alone

As full_steps.py, which measures a SiT. A cached run has the noise of the run that it is compared with, in DDPM at every
step too. The models are those of `benchmarks/digits/run.py --model dit`, HASTE, trained first if they are not there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler
from haste.io import write_text
from haste.tables import markdown_table
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from full_steps import EVEN, GRANULARITIES, beginning, beginning_name, means, psnr, read, write  # noqa: E402
from full_steps import known as measured_before  # noqa: E402
from run import trained_run  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS, TABLES = HERE / "dit.json", HERE / "dit.md"

RULES = ((4, 2), (6, EVEN))  # interval, full steps at the beginning
ORDERS = (1, 2, 3, 4)
NOISY_STEPS = (50, 250)
NOISY_GRANULARITIES = ("model", "module")
NOISY_FORECASTS = (("reuse", 0), *itertools.product(("taylor", "newton"), (1, 2, 4)))


class Point(NamedTuple):
    """One setting; `first` is --first-enhance or EVEN. cache "none": the rest is empty."""

    sampler: str
    steps: int
    spacing: str
    cache: str = "none"
    granularity: str = ""
    interval: int = 0
    first: int = 0
    order: int = 0

    @property
    def settings(self) -> SamplingConfig:
        shared: dict[str, Any] = {"mode": self.sampler, "num_steps": self.steps, "timestep_spacing": self.spacing}
        if self.cache != "none":
            shared |= {"cache": self.cache, "granularity": self.granularity, "interval": self.interval}
            shared |= {"order": self.order, **beginning(self.first)}
        return SamplingConfig(labels="balanced", **shared)

    @property
    def reference(self) -> Point:
        """The run that computes every step."""
        return Point(self.sampler, 50 if self.sampler == "ddim" else self.steps, self.spacing)

    @property
    def full(self) -> int:
        """How many steps are full."""
        steps = self.settings.planned_full_steps(self.steps)
        assert steps is not None  # as none is by an error threshold
        return len(steps) if self.cache != "none" else self.steps


@dataclass
class Args:
    """What to run and where."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    runs: Path = Path("exps/digits-benchmark")
    """Where the runs dit-haste-seed0, ... are, or go."""
    samples: int = 32
    """Images of each point and seed."""
    plot_only: bool = False
    """Measure nothing: make the tables from dit.json."""


def points() -> Iterator[Point]:
    for spacing, (interval, first) in itertools.product(("linspace", "leading"), RULES):
        made = []
        for granularity, cache, order in itertools.product(GRANULARITIES, ("taylor", "newton"), ORDERS):
            made.append(Point("ddim", 50, spacing, cache, granularity, interval, first, order))
        yield from made
        if spacing == "linspace" or 1000 % made[0].full == 0:
            yield Point("ddim", made[0].full, spacing)
    for steps, granularity, (cache, order) in itertools.product(NOISY_STEPS, NOISY_GRANULARITIES, NOISY_FORECASTS):
        yield Point("ddpm", steps, "linspace", cache, granularity, 4, 2, order)


def measure(args: Args, seed: int, seeds: dict[str, dict[Point, float]]) -> None:
    """Measure what is not known of a seed, and write it with all others."""
    start = Sampler(load_checkpoint(trained_run(args.runs, seed, "dit-digits"), device="cpu"), SamplingConfig())
    references: dict[Point, Tensor] = {}

    def images(point: Point) -> Tensor:
        """(n, C, H, W), clamped to [-1, 1]."""
        sampler = start.with_settings(point.settings)
        return sampler.run(sampler.start_of(range(args.samples))).clamp(-1, 1)

    measured = seeds.setdefault(str(seed), {})
    lacking = [point for point in dict.fromkeys(points()) if point not in measured]
    for point in tqdm(lacking, unit="point", desc=f"seed {seed}"):
        if point.reference not in references:
            references[point.reference] = images(point.reference)
        measured[point] = round(psnr(images(point), references[point.reference]), 2)
        write(args.samples, seeds, RESULTS)


# ---- the tables ----


def ddim_table(psnrs: dict[Point, float], spacing: str, interval: int, first: int) -> str:
    forecasts = list(itertools.product(("taylor", "newton"), ORDERS))
    rows = [["", *(f"{cache.title()}, order {order}" for cache, order in forecasts)]]
    for granularity in GRANULARITIES:
        cells = [psnrs[Point("ddim", 50, spacing, c, granularity, interval, first, o)] for c, o in forecasts]
        rows.append([granularity, *(f"{value:.1f}" for value in cells)])
    return markdown_table(rows).rstrip()


def ddpm_table(psnrs: dict[Point, float], steps: int) -> str:
    names = ["reuse" if cache == "reuse" else f"{cache.title()}, order {order}" for cache, order in NOISY_FORECASTS]
    rows = [["", *names]]
    for granularity in NOISY_GRANULARITIES:
        cells = [psnrs[Point("ddpm", steps, "linspace", c, granularity, 4, 2, o)] for c, o in NOISY_FORECASTS]
        rows.append([granularity, *(f"{value:.1f}" for value in cells)])
    return markdown_table(rows).rstrip()


def write_up(document: dict[str, Any]) -> str:
    psnrs, machine = means(document, Point), document["machine"]
    parts = [
        "# Digits: forecasts of a DiT under DDIM and DDPM",
        f"`python benchmarks/digits_sampling/dit.py`. Mean over {len(document['seeds'])} seed(s) of training, "
        f"{document['samples']} images each, no guidance; torch {machine['torch']}, {machine['processor']}. PSNR in dB "
        "with the run that computes every step.",
    ]
    for spacing, (interval, first) in itertools.product(("linspace", "leading"), RULES):
        full = Point("ddim", 50, spacing, "reuse", "model", interval, first).full
        uncached = psnrs.get(Point("ddim", full, spacing))
        beside = "" if uncached is None else f"; {full} uncached steps: {uncached:.1f}"
        parts += [
            f"## DDIM, 50 steps, {spacing}, interval {interval}, {beginning_name(first)}: {full} full{beside}",
            ddim_table(psnrs, spacing, interval, first),
        ]
    for steps in NOISY_STEPS:
        full = Point("ddpm", steps, "linspace", "reuse", "model", 4, 2).full
        parts += [f"## DDPM, {steps} steps, interval 4, first 2: {full} full", ddpm_table(psnrs, steps)]
    return "\n\n".join(parts) + "\n"


def main(args: Args) -> None:
    if not args.plot_only:
        document = read(RESULTS)
        seeds = measured_before(document, Point) if document["samples"] == args.samples else {}
        for seed in args.seeds:
            measure(args, seed, seeds)
    text = write_up(read(RESULTS))
    write_text(TABLES, text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
