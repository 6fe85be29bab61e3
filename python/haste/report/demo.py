"""The page of `haste demo`: samples, forecast steps beside full ones, HASTE beside a baseline, commands and timings.

And the recorded benchmark on the digits, benchmarks/digits of the repository.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import haste
import haste_ext
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.generation.sample_dir import Samples
from haste.io import read_json
from haste.metrics.evaluator import Evaluator
from haste.report.page import Panel, exact_curve, write_page
from haste.report.runs import compare, read_run
from haste.training.config import TrainConfig
from haste.validation import check

BENCHMARK = "benchmarks/digits"
COMPARED = 14  # samples in full and forecast


@dataclass(frozen=True)
class DemoResults:
    """Everything that the stages of the demo left: their settings and what came of them.

    Args:
        baseline: the settings of the run without alignment.
        records: the lines of evaluation.jsonl, of the run with HASTE and of the baseline.
    """

    config: TrainConfig
    baseline: TrainConfig
    full_settings: SamplingConfig
    full: Samples
    cached_settings: SamplingConfig
    cached: Samples
    evaluation_settings: SamplingConfig
    records: Sequence[Mapping]
    baseline_records: Sequence[Mapping]
    evaluator: Evaluator

    @property
    def speedup(self) -> float:
        """Seconds per sample in full over seconds per sample with forecasts."""
        return self.cached.sampled.images_per_second / self.full.sampled.images_per_second


def write_demo_page(folder: Path, results: DemoResults, commands: Sequence[str], seconds: Mapping[str, float]) -> Path:
    """Write folder/index.html.

    Args:
        commands: what the stages ran, to be typed again.
        seconds: of each stage, by its title.

    Returns:
        The path of the page.
    """
    page = folder / "index.html"
    runs = [
        replace(read_run(Path(config.output_dir) / config.exp_name), name=name)
        for config, name in ((results.baseline, "baseline"), (results.config, "HASTE"))
    ]
    write_page(
        page,
        "demo.html",
        results=results,
        compared=compare(runs),
        samples=sample_tiles(results),
        pairs=list(zip(results.records, results.baseline_records, strict=True)),
        forecast=compare_forecasts(results),
        benchmark=read_benchmark(),
        commands=commands,
        seconds=seconds,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU",
        machine=platform.machine(),
        settings=preset_settings(results.config),
        build=build_rows(),
    )
    return page


def sample_tiles(results: DemoResults) -> list[tuple[list[np.ndarray], str, bool]]:
    """Every sample in the order of its label, under the label and, where it differs, what the classifier reads."""
    order = np.argsort(results.full.labels, kind="stable")
    images, labels = results.full.images[order], results.full.labels[order]
    return [
        ([image], f"{label}" if label == read else f"{label} → {read}", bool(label != read))
        for image, label, read in zip(images, labels, results.evaluator.extractor(images).predictions, strict=True)
    ]


def compare_forecasts(results: DemoResults) -> dict[str, Any]:
    """The same noise sampled in full and with most steps forecast: images, their difference, and both in numbers."""
    full, cached = results.full, results.cached
    difference = np.abs(full.images.astype(np.float64) - cached.images.astype(np.float64))  # in grey levels
    shown = difference[:COMPARED].astype(np.uint8)
    peak = max(int(shown.max()), 1)
    stretched = (shown * (255.0 / peak)).astype(np.uint8)
    stacks = zip(full.images[:COMPARED], cached.images[:COMPARED], stretched, strict=True)

    def row(name: str, samples: Samples) -> tuple[str, ...]:
        sampled = samples.sampled
        accuracy = np.mean(results.evaluator.extractor(samples.images).predictions == samples.labels)
        return (name, f"{sampled.full_per_image} of {sampled.calls_per_image}", f"{sampled.seconds:.2f} s",
                f"{sampled.images_per_second:.1f}", f"{accuracy:.0%}")  # fmt: skip

    return {
        "tiles": [(images, str(label), False) for images, label in zip(stacks, full.labels[:COMPARED], strict=True)],
        "peak": peak,
        "mean": difference.mean(),
        "max": difference.max(),
        "rows": (row("In full", full), row("Forecast", cached)),
    }


def preset_settings(config: TrainConfig) -> list[tuple[str, Any]]:
    """Flags and values of what the preset sets: the settings that differ from the papers'."""
    usual = TrainConfig()
    names = [name for name, value in asdict(TrainConfig.from_preset("digits")).items() if value != getattr(usual, name)]
    return [(f"--{name.replace('_', '-')}", getattr(config, name)) for name in dict.fromkeys([*names, "seed"])]


def build_rows() -> list[tuple[str, Any]]:
    """`haste_ext.build_info()` as a table."""
    return [
        (name, (", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value) or "none")
        for name, value in haste_ext.build_info().items()
    ]


# ---- the recorded benchmark ----


@dataclass(frozen=True)
class Point:
    step: int
    fd: float
    label_accuracy: float
    samples: int


@dataclass(frozen=True)
class BenchmarkRun:
    method: str
    seed: int
    points: list[Point]
    processor: str


def read_benchmark() -> dict[str, Any]:
    """Plots and a table of the mean over seeds; why there are none where the repository is absent or damaged."""
    path = Path(haste.__file__).resolve().parents[2] / BENCHMARK / "results.json"
    if not path.is_file():
        return {"missing": f"The repository's {BENCHMARK} has runs of three seeds for each method."}
    try:
        runs = check(read_json(path, "results of the benchmark", needs=["runs"])["runs"], list[BenchmarkRun], str(path))
    except UserError as error:
        return {"missing": f"It cannot be shown: {error}."}
    return benchmark_numbers(runs)


def benchmark_numbers(runs: list[BenchmarkRun]) -> dict[str, Any]:
    """Curves of the mean over seeds, and a table of mean ± standard deviation."""
    methods = list(dict.fromkeys(run.method for run in runs))
    steps = [point.step for point in runs[0].points]
    panels, rows = [], []
    for key, title, scale, digits in (
        ("fd", "FD, lower is better", 1.0, 2),
        ("label_accuracy", "Label accuracy, %", 100.0, 1),
    ):
        curves = []
        for number, method in enumerate(methods):
            values = scale * np.array([[getattr(p, key) for p in r.points] for r in runs if r.method == method])
            means, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
            curves.append(exact_curve(number, list(zip(steps, means, strict=True))))
            cells = (f"{mean:.{digits}f} ± {s:.{digits}f}" for mean, s in zip(means, spread, strict=True))
            rows.append((title.split(",")[0], method, *cells))
        panels.append(Panel(title, curves, steps[-1], points=True, log=key == "fd"))
    return {
        "missing": None,
        "where": BENCHMARK,
        "seeds": len({run.seed for run in runs}),
        "samples": runs[0].points[0].samples,
        "processor": runs[0].processor,
        "methods": methods,
        "panels": panels,
        "header": ("", "", *(f"Step {step:,}" for step in steps)),
        "rows": rows,
    }
