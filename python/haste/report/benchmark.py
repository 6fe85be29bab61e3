"""The recorded benchmark on the digits, benchmarks/digits of the repository, as a part of a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import haste
from haste.errors import UserError
from haste.io import read_json
from haste.plain import check
from haste.report.page import legend, paragraph, section, table
from haste.report.plots import Panel, exact_curve, panels_html

WHERE = "benchmarks/digits"


@dataclass(frozen=True)
class Point:
    step: int
    distance: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class BenchmarkRun:
    method: str
    seed: int
    points: list[Point]
    processor: str


def benchmark_section() -> str:
    """Its numbers, named as recorded; where the repository is not there, as after an installation, where they are."""
    title = "The recorded benchmark"
    path = Path(haste.__file__).resolve().parents[2] / WHERE / "results.json"
    if not path.is_file():
        return section(title, paragraph(f"The repository's {WHERE} has runs of three seeds for each method."))
    try:
        runs = check(read_json(path, "results of the benchmark", needs=["runs"])["runs"], list[BenchmarkRun], str(path))
    except UserError as error:
        return section(title, paragraph(f"It cannot be shown: {error}."))
    return section(title, *recorded(runs))


def recorded(runs: list[BenchmarkRun]) -> list[str]:
    """Curves and a table of the mean over seeds."""
    methods = list(dict.fromkeys(run.method for run in runs))
    steps = [point.step for point in runs[0].points]
    panels, rows = [], []
    for key, title, scale, digits in (
        ("distance", "Fréchet distance, lower is better", 1.0, 2),
        ("accuracy", "Read as requested, %", 100.0, 1),
    ):
        curves = []
        for place, method in enumerate(methods):
            values = scale * np.array([[getattr(p, key) for p in r.points] for r in runs if r.method == method])
            means, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
            curves.append(exact_curve(place, list(zip(steps, means, strict=True))))
            cells = (f"{mean:.{digits}f} ± {s:.{digits}f}" for mean, s in zip(means, spread, strict=True))
            rows.append((title.split(",")[0], method, *cells))
        panels.append(Panel(title, curves, points=True, log=key == "distance"))
    seeds = len({run.seed for run in runs})
    note = (
        f"Not of this demo: recorded in {WHERE} of the repository, the same recipe with {seeds} seeds for each method, "
        f"{runs[0].points[0].samples:,} samples a point, on {runs[0].processor}. Mean ± standard deviation over seeds."
    )
    header = ("", "", *(f"Step {step:,}" for step in steps))
    return [paragraph(note), legend(methods), panels_html(panels, steps[-1]), table(header, rows)]
