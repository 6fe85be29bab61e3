"""The page of `haste report`: runs with their quality, curves, samples, throughput, end of alignment and settings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from haste.errors import UserError
from haste.evaluation.evaluate import NAMES
from haste.plotting import LOSSES
from haste.report.page import (
    Curve,
    Panel,
    difference,
    exact_curve,
    facts,
    folded_section,
    image,
    legend,
    panels_html,
    paragraph,
    png_uri,
    render_page,
    section,
    side_by_side,
    smooth_curve,
    table,
    write_page,
)
from haste.report.reading import Quality, Run, read_image, settings_measured, shown
from haste.training.config import TrainConfig

CURVES = {**LOSSES, "grad_norm": "Length of the gradient", "images_per_second": "Images per second"}
DIFFERENCES = {"loss": "Velocity loss", "proj_loss": "Feature loss", "attn_loss": "Attention loss"}
SHOWN_SAMPLES = 4  # of each run, spread over its length
SHOWN_MEASUREMENTS = 4  # ways in which quality was measured
BETTER = {"fd": "lower", "kid": "lower"}  # of the others, higher


def write_report(runs: Sequence[Run], page: Path) -> None:
    """Everything about these runs on one page that needs no other file."""
    names = ", ".join(run.name for run in runs)
    remarks = [remark for run in runs for remark in run.remarks]
    html = render_page(
        f"{'Runs' if len(runs) > 1 else 'Run'} {names}",
        " ".join(describe(run) for run in runs),
        facts(*headline(runs[0])) if len(runs) == 1 else "",
        quality_section(runs),
        curves_section(runs),
        training_samples_section(runs),
        numbers_section(runs),
        settings_section(runs),
        section("What is missing here", *map(paragraph, remarks)) if remarks else "",
    )
    write_page(page, html)


def describe(run: Run) -> str:
    """One sentence."""
    teacher = run.setting("enc_type", "a teacher")
    if not run.aligned:
        aligned = "without alignment"
    elif run.stop is None:
        aligned = f"aligned throughout with {teacher}"
    else:
        aligned = f"aligned with {teacher} until step {run.stop:,}"
    model, data = run.setting("model", "a model"), run.setting("data_dir", "data")
    return f"{run.name}: {model} on {data}, {run.steps:,} steps, {aligned}."


def headline(run: Run) -> list[tuple[str, str]]:
    values = [
        (f"{run.steps:,}", "steps"),
        (number(run.last("loss"), 4), "velocity loss at the end"),
        (number(run.last("images_per_second"), 1), "images per second at the end"),
    ]
    if run.stop is not None:
        values.append((f"{run.stop:,}", "step at which alignment ended"))
    return values


# ---- quality ----


def quality_section(runs: Sequence[Run]) -> str:
    """Curves and a table of every metric over checkpoints, for each way of measuring that was used."""
    ways = settings_measured(runs)
    if not ways:
        commands = " or ".join(f"haste evaluate --run {shlex.quote(shown(run.folder))}" for run in runs[:2])
        return section("Quality", paragraph(f"Nothing was measured yet; {commands} would do it."))
    parts = [legend([run.name for run in runs])] if len(runs) > 1 else []
    for how in ways[:SHOWN_MEASUREMENTS]:
        parts += measured_alike(runs, how)
    if len(ways) > SHOWN_MEASUREMENTS:
        parts.append(paragraph(f"{len(ways) - SHOWN_MEASUREMENTS} other ways of measuring are not shown."))
    return section("Quality", *parts)


def measured_alike(runs: Sequence[Run], how: str) -> list[str]:
    """Panels and table of one way of measuring."""
    by_run = {place: [q for q in run.quality if q.how == how] for place, run in enumerate(runs)}
    by_run = {place: points for place, points in by_run.items() if points}
    keys = [key for key in NAMES if any(key in point.values for points in by_run.values() for point in points)]
    last_step = max(points[-1].step for points in by_run.values())
    panels = []
    for key in keys:
        curves = [c for place, points in by_run.items() if (c := quality_curve(place, points, key)) is not None]
        stops = [(place, runs[place].stop) for place in by_run if runs[place].stop is not None]
        title = f"{metric_name(key)} ({BETTER.get(key, 'higher')} is better)"
        panels.append(Panel(title, curves, points=True, log=key == "fd", stops=stops))
    names = [runs[place].name for place in by_run]
    header = ["Step", *(f"{metric_name(key)}{f', {name}' if len(runs) > 1 else ''}" for key in keys for name in names)]
    steps = sorted({point.step for points in by_run.values() for point in points})
    values = {
        (place, p.step, key): v for place, points in by_run.items() for p in points for key, v in p.values.items()
    }
    rows = [
        (f"{step:,}", *(metric_text(key, values.get((place, step, key))) for key in keys for place in by_run))
        for step in steps
    ]
    dotted = " Dotted lines: where alignment ended." if any(panel.stops for panel in panels) else ""
    return [paragraph(f"{how}.{dotted}"), panels_html(panels, last_step), table(header, rows)]


def quality_curve(place: int, points: Sequence[Quality], key: str) -> Curve | None:
    scale = 100.0 if key == "label_accuracy" else 1.0
    values = [(point.step, scale * point.values[key]) for point in points if key in point.values]
    return exact_curve(place, values) if values else None


def metric_name(key: str) -> str:
    if key == "label_accuracy":
        return "Read as requested, %"
    return NAMES[key][0].upper() + NAMES[key][1:]


def metric_text(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if key == "label_accuracy" else f"{value:.{5 if key == 'kid' else 3}f}"


# ---- curves ----


def curves_section(runs: Sequence[Run]) -> str:
    """A panel for each quantity that any run has; of several runs also what differs from the first."""
    several = len(runs) > 1
    last_step = max(run.steps for run in runs)
    stops = [(place, run.stop) for place, run in enumerate(runs) if run.stop is not None]
    panels = []
    for key, title in CURVES.items():
        points = {place: run.curve(key) for place, run in enumerate(runs)}
        curves = [smooth_curve(place, values, alone=not several) for place, values in points.items() if values]
        if curves:
            panels.append(Panel(title, curves, stops=stops))
    parts = [panels_html(panels, last_step)]
    smoothing = f"running means over a {'tenth' if several else 'twentieth'} of the curve"
    dotted = " A dotted line marks where alignment ended." if stops else ""
    if not several:
        return section("Curves", paragraph(f"Faint: as logged. Bold: {smoothing}.{dotted}"), *parts)
    first = runs[0].name
    compared = difference_panels(runs)
    if compared:
        parts.append(
            paragraph(f"The difference to {first}, smoothed alike: below 0 a loss is lower than that of {first}.")
        )
        parts.append(panels_html(compared, last_step))
    names = legend([run.name for run in runs])
    return section("Curves", names, paragraph(f"All curves are {smoothing}.{dotted}"), *parts)


def difference_panels(runs: Sequence[Run]) -> list[Panel]:
    """For each loss that the first run shares with others, theirs minus its own."""
    panels = []
    for key, title in DIFFERENCES.items():
        base = runs[0].curve(key)
        if not base:
            continue
        points = {place: run.curve(key) for place, run in enumerate(runs[1:], start=1)}
        curves = [difference(place, values, base) for place, values in points.items() if values]
        curves = [one for one in curves if one is not None]
        if curves:
            panels.append(Panel(f"{title}, difference", curves, zero=True))
    return panels


# ---- samples ----


def training_samples_section(runs: Sequence[Run]) -> str:
    """A row for each run, a column for each step: of several runs steps that all have, where there are any."""
    sampled = [run for run in runs if run.samples]
    if not sampled:
        return ""
    common = set.intersection(*(set(run.samples) for run in sampled))
    steps = spread(sorted(common or set().union(*(run.samples for run in sampled))))
    rows = [(run.name, [sample_cell(run, step) for step in steps]) for run in sampled]
    note = "Samples of the averaged model, at every step from the same noise."
    if not common:
        note += " The runs have no step in common at which they were sampled."
    return section("Samples while training", paragraph(note), side_by_side([f"Step {step:,}" for step in steps], rows))


def spread(steps: Sequence[int]) -> list[int]:
    """A few of the steps, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, SHOWN_SAMPLES).round().astype(int))
    return [steps[index] for index in chosen]


def sample_cell(run: Run, step: int) -> str:
    """HTML of one cell."""
    if step not in run.samples:
        return "none"
    try:
        pixels = read_image(run.samples[step])
    except UserError:
        return "no whole PNG file"
    return image(png_uri(pixels), f"Samples of {run.name} at step {step:,}")


# ---- numbers ----


def numbers_section(runs: Sequence[Run]) -> str:
    """A line for each run: what it reached, and what a step took with alignment and without."""
    header = ("Run", "Steps", "Velocity loss", "Alignment ended", "Images/s aligned", "Images/s not aligned",
              "TFLOP/s", "MFU", "Peak GiB", "Steps left out")  # fmt: skip
    rows = [
        (
            run.name,
            f"{run.steps:,}",
            number(run.last("loss"), 4),
            ended(run),
            number(run.median("images_per_second", aligned=True), 1),
            number(run.median("images_per_second", aligned=False), 1),
            number(run.last("teraflops"), 3),
            number(run.last("mfu"), 3),
            number(run.last("peak_memory_gib"), 2),
            f"{sum(line.get('skipped_steps') or 0 for line in run.log):,.0f}",
        )
        for run in runs
    ]
    note = "Images per second are medians over the lines of the log; loss, TFLOP/s and memory are those of the end."
    return section("Numbers", table(header, rows), paragraph(note))


def ended(run: Run) -> str:
    """When alignment ended, for a table."""
    if not run.aligned:
        return "no alignment"
    return f"not by step {run.steps:,}" if run.stop is None else f"{run.stop:,}"


def settings_section(runs: Sequence[Run]) -> str:
    """The settings in which any run differs from the trainer's own values, a column for each run."""
    own = asdict(TrainConfig())
    names = [name for name in own if any(run.settings.get(name, own[name]) != own[name] for run in runs)]
    rows = [(f"--{name.replace('_', '-')}", *(run.setting(name) for run in runs)) for name in names]
    return folded_section("Settings", table(("Flag", *(run.name for run in runs)), rows))


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else shown(f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}")
