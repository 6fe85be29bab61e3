"""Which steps of a cached run should be full, and which forecast suits shifted times: PSNR on the digits.

    python benchmarks/digits_sampling/full_steps.py               what is not measured yet, then the tables
    python benchmarks/digits_sampling/full_steps.py --seeds 0     of that, one seed
    python benchmarks/digits_sampling/full_steps.py --plot-only   the tables from full_steps.json alone

TaylorSeer's full steps are 0 … f − 1 and from f − 1 on one in every interval (f is --first-enhance); --spacing even
spreads them from step 0 to the last but one. Everything is compared with the run of as many steps that are all full,
from the same noise: PSNR of the images before their rounding to 8 bits, pooled over the images of a seed, then the mean
over the seeds. Times are even, or shifted as flow-matching pipelines shift them, t' = 3t / (1 + 2t). The models are
those of run.py.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import tyro
from haste.caching import FAST, CacheConfig, enable_cache
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler, Start
from haste.io import write_text
from haste.tables import markdown_table
from torch import Tensor, nn
from tqdm import tqdm

from haste_ext.bench.measure import describe_machine

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run import trained_run  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS, TABLES = HERE / "full_steps.json", HERE / "full_steps.md"

GRIDS = ((50, 1), (50, 3), (28, 1), (28, 3))  # steps, shift
SHORT = (8, 10, 12, 20, 28, 50)  # steps of runs with the default settings
INTERVALS = (4, 5, 6)
EVEN = 0  # in place of a number of full steps at the beginning
FIRST = (1, 2, 3, EVEN)
GRANULARITIES = ("output", "model", "block", "module")
ORDERS = (1, 2)


class Point(NamedTuple):
    """One setting; `first` is --first-enhance or EVEN. cache "none": `full` uncached steps, the rest is empty."""

    steps: int
    shift: int
    cache: str
    granularity: str = ""
    interval: int = 0
    first: int = 0
    order: int = 0
    full: int = 0


@dataclass
class Args:
    """What to run and where."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the training."""
    runs: Path = Path("exps/digits-benchmark")
    """Where the runs haste-seed0, ... are, or go."""
    samples: int = 64
    """Images of each point and seed."""
    plot_only: bool = False
    """Measure nothing: make the tables from first_steps.json."""


def points() -> Iterator[Point]:
    for steps, shift in GRIDS:
        counts = set()
        for interval, first in itertools.product(INTERVALS, FIRST):
            full = len(CacheConfig(cache="newton", interval=interval, **beginning(first)).planned_full_steps(steps))
            counts.add(full)
            for granularity, order in itertools.product(GRANULARITIES, ORDERS):
                # Over even times the two are one forecaster at order 1.
                for cache in ("taylor", "newton") if order > 1 or shift > 1 else ("newton",):
                    yield Point(steps, shift, cache, granularity, interval, first, order, full)
        for full in sorted(counts):
            yield Point(steps, shift, "none", full=full)
    for steps, shift in itertools.product(SHORT, (1, 3)):
        for point in defaults(steps, shift):
            yield from (point, Point(steps, shift, "none", full=point.full))
        yield fourth_order(steps, shift)


def defaults(steps: int, shift: int) -> list[Point]:
    """FAST in a run of this many steps; and TaylorSeer's spacing of the same interval."""
    fast = FAST.fitted(steps, ("interval", "order"))
    made = []
    for first in (EVEN, 2):
        config = replace(fast, **{"spacing": "interval", **beginning(first)})
        full = len(config.planned_full_steps(steps))
        order = min(config.resolved_order, full - 1)
        made.append(Point(steps, shift, "newton", "model", config.resolved_interval, first, order, full))
    return made


def fourth_order(steps: int, shift: int) -> Point:
    """The default with order 4, as far as the full steps allow."""
    even = defaults(steps, shift)[0]
    return even._replace(order=min(4, even.full - 1))


def beginning(first: int) -> dict[str, Any]:
    return {"spacing": "even"} if first == EVEN else {"first_enhance": first}


def beginning_name(first: int) -> str:
    return "even" if first == EVEN else f"first {first}"


def shifted_times(steps: int, shift: float) -> list[float]:
    """The steps + 1 times from 1 to 0."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@torch.no_grad()
def sample(model: nn.Module, start: Start, times: list[float]) -> Tensor:
    """Euler's method through these times: images (n, C, H, W), clamped to [-1, 1]."""
    x = start.noise.double()
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * model(x.float(), torch.full((len(x),), t), start.condition)[0].double()
    return x.clamp(-1, 1)


def psnr(images: Tensor, reference: Tensor) -> float:
    """In dB, over all images together; their range is 2."""
    return 10 * math.log10(4 / (images - reference).square().mean().item())


def measure(args: Args, seed: int, before: dict[Point, float]) -> dict[Point, float]:
    loaded = load_checkpoint(trained_run(args.runs, seed), device="cpu")
    model = loaded.model
    start = Sampler(loaded, SamplingConfig(labels="balanced")).start_of(range(args.samples))
    reference: dict[tuple[int, int], Tensor] = {}
    measured = {}
    for point in tqdm(list(dict.fromkeys(points())), unit="point", desc=f"seed {seed}"):
        if point in before:
            measured[point] = before[point]
            continue
        grid = (point.steps, point.shift)
        if grid not in reference:
            reference[grid] = sample(model, start, shifted_times(*grid))
        if point.cache == "none":
            images = sample(model, start, shifted_times(point.full, point.shift))
        else:
            times = shifted_times(*grid)
            settings = {"granularity": point.granularity, "interval": point.interval, "order": point.order}
            settings |= beginning(point.first)
            fast = enable_cache(model, cache=point.cache, times=times[:-1], **settings)
            images = sample(fast, start, times)
        measured[point] = round(psnr(images, reference[grid]), 2)
    return measured


# ---- the file, and its tables ----


def read(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"samples": 0, "seeds": {}}


def write(samples: int, seeds: Mapping[str, Mapping[Any, float]], path: Path = RESULTS) -> None:
    """seeds: of each the PSNR of every point, a NamedTuple; one line for a point."""
    rows = {seed: [[*point, value] for point, value in own.items()] for seed, own in seeds.items()}
    columns = [*next(iter(next(iter(seeds.values()))))._fields, "psnr"]
    content = {"machine": describe_machine("cpu"), "samples": samples, "columns": columns}
    listed = ",\n".join(
        f"  {json.dumps(seed)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in own) + "\n  ]"
        for seed, own in rows.items()
    )
    head = json.dumps(content, indent=1)
    write_text(path, f'{head[:-2]},\n "seeds": {{\n{listed}\n }}\n}}\n')


def known(document: dict[str, Any], kind: Any = Point) -> dict[str, dict[Any, float]]:
    """What `write` was given, of points of that kind."""
    return {seed: {kind(*row[:-1]): row[-1] for row in rows} for seed, rows in document["seeds"].items()}


def means(document: dict[str, Any], kind: Any = Point) -> dict[Any, float]:
    seeds = list(known(document, kind).values())
    return {point: mean(own[point] for own in seeds) for point in seeds[0]}


def grid_name(steps: int, shift: int) -> str:
    return f"{steps} steps" if shift == 1 else f"{steps} steps, shift {shift}"


def found(psnrs: dict[Point, float], *point: Any) -> Point:
    """The point with these values of its fields but `full`."""
    return next(each for each in psnrs if each[:7] == point)


def first_table(psnrs: dict[Point, float], granularity: str, order: int) -> str:
    """Newton's forecast by the spacing of the full steps: PSNR (full steps)."""
    rows = [["times", "interval", *map(beginning_name, FIRST)]]
    for grid, interval in itertools.product(GRIDS, INTERVALS):
        points = [found(psnrs, *grid, "newton", granularity, interval, first, order) for first in FIRST]
        rows.append([grid_name(*grid), str(interval), *(f"{psnrs[point]:.1f} ({point.full})" for point in points)])
    return markdown_table(rows).rstrip()


def forecast_table(psnrs: dict[Point, float], first: int, interval: int = 6) -> str:
    """Taylor's forecast beside Newton's: output / model / block / module."""
    columns = list(itertools.product(ORDERS, ("taylor", "newton")))
    rows = [["times", *(f"{cache.title()}, order {order}" for order, cache in columns), "uncached"]]
    for grid in GRIDS:
        full = found(psnrs, *grid, "newton", "model", interval, first, 1).full
        row = [f"{grid_name(*grid)}, {full} full"]
        for order, cache in columns:
            points = [Point(*grid, cache, name, interval, first, order, full) for name in GRANULARITIES]
            values = [f"{psnrs[point]:.1f}" for point in points if point in psnrs]
            row.append(" / ".join(values) or "the same")
        rows.append([*row, f"{psnrs[Point(*grid, 'none', full=full)]:.1f}"])
    return markdown_table(rows).rstrip()


def default_table(psnrs: dict[Point, float]) -> str:
    """The default settings by the length of a run."""
    rows = [["steps", "interval", "shift", "even", "even, order 4", "first 2", "as many uncached steps"]]
    for steps, shift in itertools.product(SHORT, (1, 3)):
        even, other = defaults(steps, shift)
        uncached = psnrs[Point(steps, shift, "none", full=even.full)]
        cells = [f"{psnrs[point]:.1f} ({point.full})" for point in (even, fourth_order(steps, shift), other)]
        rows.append([str(steps), str(even.interval), str(shift), *cells, f"{uncached:.1f}"])
    return markdown_table(rows).rstrip()


def gains(psnrs: dict[Point, float]) -> str:
    """What an even spacing gains over TaylorSeer's of as many full steps, over all settings that have both."""
    rows = [["even against", "times", "settings", "better in", "mean gain", "least", "most"]]
    for other, grid in itertools.product(FIRST[:-1], GRIDS):
        cached = [point for point in psnrs if point.first == other and point[:2] == grid]
        won = [
            psnrs[even] - psnrs[point]
            for point in cached
            for interval in INTERVALS
            if (even := found(psnrs, *point[:4], interval, EVEN, point.order)).full == point.full
        ]
        better = sum(gain > 0 for gain in won)
        numbers = (f"{value:+.1f}" for value in (mean(won), min(won), max(won))) if won else ("", "", "")
        rows.append([beginning_name(other), grid_name(*grid), str(len(won)), str(better), *numbers])
    return markdown_table(rows).rstrip()


def write_up(document: dict[str, Any]) -> str:
    psnrs = means(document)
    machine = document["machine"]
    parts = [
        "# Digits: which steps are full, and forecasts on shifted times",
        f"`python benchmarks/digits_sampling/full_steps.py`. Mean over {len(document['seeds'])} seed(s) of training, "
        f"{document['samples']} images each; torch {machine['torch']}, {machine['processor']}. PSNR in dB with the run "
        "that computes every step.",
        "## An even spacing against TaylorSeer's, as many full steps: dB",
        gains(psnrs),
    ]
    for granularity, order in itertools.product(("model", "output"), ORDERS):
        parts += [f"## Newton, {granularity}, order {order}: PSNR (full steps)",
                  first_table(psnrs, granularity, order)]  # fmt: skip
    for first in (3, EVEN):
        parts += [f"## Interval 6, {beginning_name(first)}: {' / '.join(GRANULARITIES)}",
                  forecast_table(psnrs, first)]  # fmt: skip
    parts += ["## The default settings (Newton, model, order 2) by the length of a run: PSNR (full steps)",
              default_table(psnrs)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(args: Args) -> None:
    document = read()
    if not args.plot_only:
        fresh = document["samples"] != args.samples
        seeds = {} if fresh else known(document)
        for seed in args.seeds:
            seeds[str(seed)] = measure(args, seed, seeds.get(str(seed), {}))
            write(args.samples, seeds)
        document = read()
    text = write_up(document)
    write_text(TABLES, text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
