"""The page of `haste demo`: the pictures, forecast steps beside full ones, curves, commands, timings and settings."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import haste_ext
from haste.evaluation.pictures import draw_comparison, draw_grid, draw_losses, draw_scores
from haste.evaluation.scores import Yardstick
from haste.evaluation.style import DARK, LIGHT, Theme
from haste.generation.sample_folder import Samples
from haste.generation.settings import SamplingSettings
from haste.report.page import (
    commands,
    facts,
    folded_section,
    paragraph,
    render_page,
    section,
    table,
    themed_figure,
    write_page,
)
from haste.training.config import TrainConfig
from haste.training.recipes import recipe_config
from haste.training.run_log import alignment_end, read_log

COMPARED = 14  # pictures side by side


@dataclass(frozen=True)
class DemoResults:
    """Everything that the stages of the demo left: their settings and what came of them."""

    config: TrainConfig
    full_settings: SamplingSettings
    full: Samples
    cached_settings: SamplingSettings
    cached: Samples
    judged_settings: SamplingSettings
    records: Sequence[Mapping]
    yardstick: Yardstick

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir) / self.config.exp_name

    @property
    def speedup(self) -> float:
        """Seconds per picture in full over seconds per picture with forecasts."""
        return self.cached.drawn.pictures_per_second / self.full.drawn.pictures_per_second

    @property
    def difference(self) -> np.ndarray:
        """Absolute difference of the two sets of pictures in grey levels, (N, H, W, 3) float64."""
        return np.abs(self.full.images.astype(np.float64) - self.cached.images.astype(np.float64))


def write_demo_page(
    folder: Path, results: DemoResults, command_lines: Sequence[str], seconds: Mapping[str, float]
) -> Path:
    """Draw the pictures into folder/pictures and write folder/index.html; returns its path."""
    config, last = results.config, results.records[-1]
    html = render_page(
        "HASTE on handwritten digits",
        f"A diffusion transformer, {config.model}, learned to draw scikit-learn's 1,797 handwritten digits in "
        f"{config.max_train_steps:,} steps. {taught_by(config)}",
        facts(
            (f"{last['distance']:.2f}", "Fréchet distance to the real digits"),
            (f"{last['accuracy']:.0%}", "of samples show the requested digit"),
            (f"{results.speedup:.2f}×", "images per second with most steps forecast"),
            (f"{sum(seconds.values()):.0f} s", "for everything on this page"),
        ),
        samples_section(folder, results),
        forecast_section(folder, results),
        training_section(folder, results),
        section(
            "The same by hand",
            paragraph("Each line can be typed again, in this order; a command that is done finds nothing left to do."),
            commands(command_lines),
        ),
        timings_section(seconds),
        settings_section(config),
        build_section(),
    )
    page = folder / "index.html"
    write_page(page, html)
    return page


def taught_by(config: TrainConfig) -> str:
    """One sentence on the alignment of this run."""
    if not config.teachers:
        return "It had no teacher."
    until = "throughout" if config.early_stop_point < 0 else f"for the first {config.early_stop_point:,} of them"
    return (
        f"A small vision transformer, trained to read the same digits, taught it {until}: its attention maps and its "
        "features were the student's to imitate. Then the teacher was let go."
    )


def samples_section(folder: Path, results: DemoResults) -> str:
    order = np.argsort(results.full.labels, kind="stable")
    images, labels = results.full.images[order], results.full.labels[order]
    read = results.yardstick.judge(images).predictions
    right = int((read == labels).sum())

    def draw(path: Path, theme: Theme) -> None:
        title = f"{len(labels)} samples, {results.full_settings.describe()}"
        draw_grid(path, images, labels, title=title, predictions=read, theme=theme)

    return section(
        "What it draws",
        both_themes(
            folder,
            "samples",
            draw,
            alt=f"A grid of {len(labels)} generated digits with the digit that was asked for above each",
            caption=f"Above each picture the digit that was asked for. In {right} of {len(labels)} the judge, a "
            "classifier that no training run has seen, reads that digit; where it reads another one, this one stands "
            "in red behind an arrow. Pictures are 8 × 8 pixels, enlarged.",
        ),
    )


def forecast_section(folder: Path, results: DemoResults) -> str:
    full, cached = results.full.drawn, results.cached.drawn
    args = results.cached_settings
    difference = results.difference
    forecast = cached.evaluations_per_picture - cached.full_per_picture

    def draw(path: Path, theme: Theme) -> None:
        draw_comparison(
            path,
            results.full.images[:COMPARED],
            results.cached.images[:COMPARED],
            results.full.labels[:COMPARED],
            title=f"The same seeds in full and forecast: {args.describe_cache()}",
            names=(f"{full.full_per_picture} full steps", f"{cached.full_per_picture} full,\n{forecast} forecast"),
            theme=theme,
        )

    def row(name: str, samples: Samples) -> tuple[str, ...]:
        drawn = samples.drawn
        accuracy = results.yardstick.judge(samples.images).accuracy(samples.labels)
        return (name, f"{drawn.full_per_picture} of {drawn.evaluations_per_picture}", f"{drawn.seconds:.2f} s",
                f"{drawn.pictures_per_second:.1f}", f"{accuracy:.0%}")  # fmt: skip

    return section(
        "Most steps forecast instead of computed",
        paragraph(
            f"Only some sampling steps are computed in full. At the others ({args.describe_cache()}) the model's work "
            "is forecast from that of the last full steps, as TaylorSeer does, by the operation taylor_extrapolate."
        ),
        both_themes(
            folder,
            "forecast",
            draw,
            alt="Digits drawn in full, the same seeds with most steps forecast, and their absolute difference",
            caption=f"The pictures differ by {difference.mean():.1f} of 255 grey levels on average, by "
            f"{difference.max():.0f} at most, over all {len(difference)} pictures.",
        ),
        table(
            ("Sampling", "Full model evaluations", "Seconds", "Images per second", "Read as requested"),
            (row("In full", results.full), row("Forecast", results.cached)),
        ),
        paragraph(
            f"Steps computed in full are {full.full_per_picture / cached.full_per_picture:.2f} times fewer; the clock "
            f"says {results.speedup:.2f} times faster."
        ),
    )


def training_section(folder: Path, results: DemoResults) -> str:
    run = results.run
    log = read_log(run / "log.jsonl").lines
    stop = alignment_end(log)
    yardstick, records = results.yardstick, results.records

    def losses(path: Path, theme: Theme) -> None:
        draw_losses(path, log, title="Losses over training", stop=stop, theme=theme)

    def scores(path: Path, theme: Theme) -> None:
        draw_scores(path, {run.name: {0: records}}, title="Quality over training", stop=stop, theme=theme)

    rows = [
        (f"{r['step']:,}", f"{r['distance']:.2f}", f"{r['accuracy']:.1%}", f"{r['seconds']:.1f} s") for r in records
    ]
    return section(
        "How it learned",
        both_themes(folder, "losses", losses, alt="Loss curves of the run"),
        both_themes(
            folder,
            "quality",
            scores,
            alt="Fréchet distance and label accuracy at five checkpoints",
            caption=f"{records[-1]['samples']:,} samples a point, {results.judged_settings.describe()}. "
            f"Distance in {yardstick.real.dimension} features of the judge, which reads "
            f"{yardstick.judge.held_out_accuracy:.1%} of the real digits it has not seen; two halves of the real "
            f"digits are {yardstick.halves:.2f} apart.",
        ),
        table(("Step", "Fréchet distance", "Read as requested", "Seconds to judge"), rows),
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
    """The settings that the recipe sets, which are those that differ from the papers'."""
    names = [name for name, value in asdict(recipe_config("digits")).items() if value != getattr(TrainConfig(), name)]
    rows = [(f"--{name.replace('_', '-')}", getattr(config, name)) for name in dict.fromkeys([*names, "seed"])]
    return folded_section("Settings of the run", table(("Flag", "Value"), rows))


def build_section() -> str:
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
        for name, value in haste_ext.build_info().items()
    ]
    return section(
        "Build", table(("haste_ext.build_info()", "Value"), [(name, value or "none") for name, value in rows])
    )


def both_themes(folder: Path, name: str, draw: Callable, *, alt: str, caption: str = "") -> str:
    """Draw a picture for light and for dark pages and embed both."""
    paths = {theme.name: folder / "pictures" / f"{name}-{theme.name}.png" for theme in (LIGHT, DARK)}
    for theme in (LIGHT, DARK):
        draw(paths[theme.name], theme)
    return themed_figure(paths["light"], paths["dark"], alt, caption)
