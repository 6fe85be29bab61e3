"""The recorded benchmark on the digits, benchmarks/digits of the repository, as a part of a page.

The page of `haste demo`: samples, forecast steps beside full ones, HASTE beside a baseline, commands and timings.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import haste
import haste_ext
from haste.errors import UserError
from haste.evaluation.evaluate import Evaluator
from haste.generation.config import SamplingConfig
from haste.generation.sample_dir import Samples
from haste.io import read_json
from haste.report.page import (
    Panel,
    commands,
    exact_curve,
    facts,
    folded_section,
    legend,
    panels_html,
    paragraph,
    render_page,
    section,
    table,
    tiles,
    write_page,
)
from haste.report.runs import (
    curves_section,
    numbers_section,
    quality_section,
    read_run,
    training_samples_section,
)
from haste.training.config import TrainConfig, preset_config
from haste.validation import check

WHERE = "benchmarks/digits"


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
        ("fd", "FD, lower is better", 1.0, 2),
        ("label_accuracy", "Read as requested, %", 100.0, 1),
    ):
        curves = []
        for place, method in enumerate(methods):
            values = scale * np.array([[getattr(p, key) for p in r.points] for r in runs if r.method == method])
            means, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
            curves.append(exact_curve(place, list(zip(steps, means, strict=True))))
            cells = (f"{mean:.{digits}f} ± {s:.{digits}f}" for mean, s in zip(means, spread, strict=True))
            rows.append((title.split(",")[0], method, *cells))
        panels.append(Panel(title, curves, points=True, log=key == "fd"))
    seeds = len({run.seed for run in runs})
    note = (
        f"Not of this demo: recorded in {WHERE} of the repository, the same preset with {seeds} seeds for each method, "
        f"{runs[0].points[0].samples:,} samples a point, on {runs[0].processor}. Mean ± standard deviation over seeds."
    )
    header = ("", "", *(f"Step {step:,}" for step in steps))
    return [paragraph(note), legend(methods), panels_html(panels, steps[-1]), table(header, rows)]


COMPARED = 14  # samples in full and forecast


@dataclass(frozen=True)
class DemoResults:
    """Everything that the stages of the demo left: their settings and what came of them.

    baseline: the settings of the run without alignment. records: of evaluation.jsonl, of both runs.
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
    def folders(self) -> list[Path]:
        """Of the runs, the baseline first, with which the other is compared."""
        return [Path(config.output_dir) / config.exp_name for config in (self.baseline, self.config)]

    @property
    def speedup(self) -> float:
        """Seconds per sample in full over seconds per sample with forecasts."""
        return self.cached.sampled.images_per_second / self.full.sampled.images_per_second

    @property
    def difference(self) -> np.ndarray:
        """Absolute difference of the two sets of samples in grey levels, (N, H, W, 3) float64."""
        return np.abs(self.full.images.astype(np.float64) - self.cached.images.astype(np.float64))


def write_demo_page(
    folder: Path, results: DemoResults, command_lines: Sequence[str], seconds: Mapping[str, float]
) -> Path:
    """Write folder/index.html; returns its path."""
    config, last, baseline = results.config, results.records[-1], results.baseline_records[-1]
    names = ("baseline", "HASTE")
    runs = [replace(read_run(run), name=name) for run, name in zip(results.folders, names, strict=True)]
    html = render_page(
        "HASTE on handwritten digits",
        f"A diffusion transformer, {config.model}, learned to make scikit-learn's 1,797 handwritten digits in "
        f"{config.max_train_steps:,} steps, once with HASTE and once without alignment. {aligned_with(config)}",
        facts(
            (f"{last['fd']:.2f}",
             f"Fréchet distance to the real digits; {baseline['fd']:.2f} without HASTE"),
            (f"{last['label_accuracy']:.1%}",
             f"of {last['samples']:,} samples read as requested; {baseline['label_accuracy']:.1%} without HASTE"),
            (f"{results.speedup:.2f}×", "images per second with most steps forecast"),
            (f"{sum(seconds.values()):.0f} s", "for everything on this page"),
        ),
        samples_section(results),
        section("HASTE beside the baseline", paragraph(what_is_seen(results)), paragraph(how_measured(results))),
        quality_section(runs),
        training_samples_section(runs),
        curves_section(runs),
        numbers_section(runs),
        benchmark_section(),
        forecast_section(results),
        section(
            "The same by hand",
            paragraph("Each line can be typed again, in this order; a command that is done finds nothing left to do."),
            commands(command_lines),
        ),
        timings_section(seconds),
        settings_section(config),
        build_section(),
    )  # fmt: skip
    page = folder / "index.html"
    write_page(page, html)
    return page


def aligned_with(config: TrainConfig) -> str:
    """One sentence on the alignment of the run with HASTE."""
    until = "throughout" if config.early_stop_point < 0 else f"for the first {config.early_stop_point:,} steps"
    return (
        f"HASTE aligns it {until} with a small vision transformer that was trained to read the same digits: with its "
        "attention maps and its features. Then the teacher is released."
    )


def samples_section(results: DemoResults) -> str:
    """Every sample in the order of its label."""
    order = np.argsort(results.full.labels, kind="stable")
    images, labels = results.full.images[order], results.full.labels[order]
    read = results.evaluator.extractor(images).predictions
    wrong = (read != labels).tolist()
    titles = [f"{label}" if label == other else f"{label} → {other}" for label, other in zip(labels, read, strict=True)]
    classifier = results.evaluator.extractor
    return section(
        "What it samples",
        tiles(images, titles, wrong),
        paragraph(
            f"{len(labels)} samples of the run with HASTE, {results.full_settings.describe()}, 8 × 8 pixels, enlarged. "
            "Above each the digit that was requested. A classifier, a small convolutional network that no training run "
            f"has seen, reads it as requested in {wrong.count(False)} of these {len(labels)}; where it reads another "
            f"digit, that one stands in red behind an arrow. Of real digits that it was not trained on, it reads "
            f"{classifier.held_out_accuracy:.1%}."
        ),
    )


def what_is_seen(results: DemoResults) -> str:
    """The numbers of the two runs in words, as they are."""
    pairs = list(zip(results.records, results.baseline_records, strict=True))
    nearer = sum(own["fd"] < other["fd"] for own, other in pairs)
    read = sum(own["label_accuracy"] > other["label_accuracy"] for own, other in pairs)
    own, other = pairs[-1]
    return (
        f"The baseline is the same model with the same seed, data and number of steps, trained without alignment. At "
        f"{nearer} of {len(pairs)} checkpoints the samples of HASTE are nearer to the real digits, and at {read} of "
        f"{len(pairs)} more of them are read as requested. At the last one the Fréchet distance is "
        f"{own['fd']:.2f} with HASTE and {other['fd']:.2f} without (lower is better), and "
        f"{own['label_accuracy']:.1%} and {other['label_accuracy']:.1%} are read as requested. This is one seed of "
        f"either; differences as small as those between two seeds say nothing."
    )


def how_measured(results: DemoResults) -> str:
    """Which samples the quality below is of: others than those above, so that the shares of either differ."""
    evaluator = results.evaluator
    return (
        f"Quality is measured of {results.records[-1]['samples']:,} samples for each checkpoint, "
        f"{results.evaluation_settings.describe()}, others than those shown above: the two accuracies on this "
        f"page differ by that. The Fréchet distance is taken in {evaluator.reference.dimension} features of the same "
        f"classifier; two halves of the real digits are {evaluator.split_half_fd:.2f} apart."
    )


def forecast_section(results: DemoResults) -> str:
    full, cached = results.full.sampled, results.cached.sampled
    args, difference = results.cached_settings, results.difference
    shown = difference[:COMPARED].astype(np.uint8)
    peak = max(int(shown.max()), 1)
    stretched = (shown * (255.0 / peak)).astype(np.uint8)
    stacks = np.stack([results.full.images[:COMPARED], results.cached.images[:COMPARED], stretched], axis=1)

    def row(name: str, samples: Samples) -> tuple[str, ...]:
        sampled = samples.sampled
        accuracy = np.mean(results.evaluator.extractor(samples.images).predictions == samples.labels)
        return (name, f"{sampled.full_per_image} of {sampled.calls_per_image}", f"{sampled.seconds:.2f} s",
                f"{sampled.images_per_second:.1f}", f"{accuracy:.0%}")  # fmt: skip

    return section(
        "Most steps forecast instead of computed",
        paragraph(
            f"Only some sampling steps are computed in full. At the others ({args.describe_cache()}) the model's work "
            "is forecast from that of the last full steps, as TaylorSeer does, by the operation taylor_extrapolate."
        ),
        tiles(stacks, [str(label) for label in results.full.labels[:COMPARED]]),
        paragraph(
            f"The same noise, below each other: {full.full_per_image} full steps; {cached.full_per_image} full and "
            f"{cached.calls_per_image - cached.full_per_image} forecast; their absolute difference, where "
            f"white is {peak} of 255 grey levels. Over all {len(difference)} samples they differ by "
            f"{difference.mean():.1f} grey levels on average and by {difference.max():.0f} at most."
        ),
        table(
            ("Sampling", "Full model calls", "Seconds", "Images per second", f"Of {len(difference)} read as requested"),
            (row("In full", results.full), row("Forecast", results.cached)),
        ),
        paragraph(
            f"Steps computed in full are {full.full_per_image / cached.full_per_image:.2f} times fewer; the clock "
            f"says {results.speedup:.2f} times faster."
        ),
    )


def timings_section(seconds: Mapping[str, float]) -> str:
    rows = [*seconds.items(), ("in all", sum(seconds.values()))]
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    return section(
        "What it took",
        table(("Stage", "Seconds"), [(name, f"{value:.1f} s") for name, value in rows]),
        paragraph(f"On {device}, with {threads} thread{'s' * (threads > 1)} ({platform.machine()})."),
    )


def settings_section(config: TrainConfig) -> str:
    """The settings that the preset sets, which are those that differ from the papers'."""
    names = [name for name, value in asdict(preset_config("digits")).items() if value != getattr(TrainConfig(), name)]
    rows = [(f"--{name.replace('_', '-')}", getattr(config, name)) for name in dict.fromkeys([*names, "seed"])]
    return folded_section("Settings of the run with HASTE", table(("Flag", "Value"), rows))


def build_section() -> str:
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
        for name, value in haste_ext.build_info().items()
    ]
    return section(
        "Build", table(("haste_ext.build_info()", "Value"), [(name, value or "none") for name, value in rows])
    )
