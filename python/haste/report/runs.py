"""The page of `haste report`: what the folders of runs hold, and the sections that show it.

A run's files may be of an earlier version, or cut short: what cannot be read is left out, and the page says so.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError, in_one_line
from haste.evaluation.evaluate import NAMES
from haste.evaluation.runs import RECORDS, read_evaluations
from haste.io import read_json
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
from haste.resumable import read_lines
from haste.training.checkpoint import DIGEST, WRITTEN
from haste.training.config import TrainConfig
from haste.training.logging import alignment_end, finite, is_step, read_log
from haste.training.samples import MISSING

# ---- reading a run ----

IMAGE_SIDE = 520  # pixels on the page; larger images are made smaller
LARGEST_IMAGE = 64 * 2**20  # pixels
LONGEST = 200  # characters of a setting that are shown
_MEASURED = {"step", "checkpoint", DIGEST, WRITTEN, "fd", "label_accuracy", "samples", "seconds", "evaluated_by"}
_STEP = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True)
class Quality:
    """Metrics of one checkpoint. how: what they were measured of and against; only those of one `how` compare.

    values: by the keys of `evaluation.evaluate.NAMES`.
    """

    how: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """folder: as it was given, to be typed again. stop: the step at which alignment ended, None if it did not or there
    was none. remarks: what was left out."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    samples: Mapping[int, Path]
    quality: Sequence[Quality]
    stop: int | None
    remarks: Sequence[str] = field(default=())

    @property
    def steps(self) -> int:
        return self.log[-1]["step"]

    @property
    def aligned(self) -> bool:
        """Whether there was a teacher at any time."""
        return any(line["aligned"] for line in self.log)

    def setting(self, name: str, default: object = "") -> str:
        """A setting as text that fits into a table."""
        return shown(self.settings.get(name, default))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have the value."""
        return [(line["step"], line[key]) for line in self.log if line.get(key) is not None]

    def median(self, key: str, aligned: bool) -> float | None:
        """Over the lines of the log with alignment or without it; the first line, which warms up, is left out."""
        values = [line[key] for line in self.log[1:] if line["aligned"] == aligned and line.get(key) is not None]
        return statistics.median(values) if values else None

    def last(self, key: str) -> float | None:
        """The mean over the last tenth of the log."""
        values = [line[key] for line in self.log[-max(1, len(self.log) // 10) :] if line.get(key) is not None]
        return statistics.mean(values) if values else None


def read_run(folder: Path) -> Run:
    """UserError if the folder holds no run that has begun."""
    log, damaged = read_log(folder / "log.jsonl")
    if not log:
        raise UserError(f"{folder} holds no log.jsonl with a line in it; it must be the folder of a run of haste train")
    settings = read_json(folder / "args.json", "the settings of a run")
    name = shown(folder.resolve().name)
    remarks = [f"{name}: {damaged} lines of log.jsonl cannot be read and are left out."] if damaged else []
    samples, quality = find_samples(folder), read_quality(folder, name, remarks)
    if not samples:
        remarks.append(f"{name} has no samples: {why_missing(folder)}.")
    return Run(folder, name, settings, log, samples, quality, alignment_end(log), remarks)


def shown(value: object) -> str:
    """Any value as text that UTF-8 can hold, without control characters, shortened."""
    text = str(value).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def find_samples(folder: Path) -> dict[int, Path]:
    """Step → its samples, in the order of the steps. Whether a file is a whole PNG shows when it is read."""
    names = {path.stem: path for path in (folder / "samples").glob("*.png") if _STEP.fullmatch(path.stem)}
    return {step: names[stem] for step, stem in sorted((int(stem), stem) for stem in names)}


def why_missing(folder: Path) -> str:
    """The reason that the trainer has left, or the usual one."""
    path = folder / "samples" / MISSING
    if path.is_file():
        with path.open("rb") as file:
            return shown(file.read(1000).decode("utf-8", "replace").strip())
    return "it trained without --sampling-steps, or has not come to the first one"


def read_image(path: Path) -> np.ndarray:
    """A PNG file as (H, W, 3) uint8, made smaller where it is large. UserError if it is no whole one."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise UserError(f"{path} has {image.width} x {image.height} pixels")
            image = image.convert("RGB")  # type: ignore[assignment]
    except UserError:
        raise
    except Exception as error:  # a damaged file leads PIL to raise anything
        raise UserError(f"{path} is no whole PNG: {in_one_line(error)}") from error
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return np.asarray(image)


# ---- reading evaluations ----


def read_quality(folder: Path, name: str, remarks: list[str]) -> list[Quality]:
    """What `haste evaluate` has left in a run's folder, of digits and of other data; the newest of each checkpoint."""
    found: dict[tuple[str, int], Quality] = {}
    unreadable = 0
    try:
        records, damaged = read_lines(folder / RECORDS)
    except UserError:
        records, damaged = [], 1
    unreadable += damaged
    entries: list[Quality | None] = [digits_quality(record) for record in records]
    for path in sorted((folder / "samples").glob("*-evaluation.json")):
        try:
            entries += [samples_quality(entry) for entry in read_evaluations(path)]
        except UserError:
            unreadable += 1
    for quality in entries:
        if quality is None:
            unreadable += 1
        elif quality.values:
            found[quality.how, quality.step] = quality
    if unreadable:
        remarks.append(f"{name}: {unreadable} records of evaluations cannot be read and are left out.")
    return sorted(found.values(), key=lambda quality: (quality.how, quality.step))


def digits_quality(record: Mapping[str, Any]) -> Quality | None:
    """A line of evaluation.jsonl; None if it is something else. A checkpoint without a step is passed over."""
    step, samples = record.get("step"), record.get("samples")
    if step is None and "checkpoint" in record:
        return Quality("", 0, {})
    if not is_step(step) or not is_step(samples):
        return None
    values = {"fd": finite(record.get("fd")), "label_accuracy": finite(record.get("label_accuracy"))}
    return Quality(
        f"{samples:,} samples, {sampling_text(record)}; classifier of the digits against the real digits",
        step,
        {key: value for key, value in values.items() if value is not None},
    )


def sampling_text(record: Mapping[str, Any]) -> str:
    """'25 steps, cfg_scale 1.5, cache taylor': how the samples of a line of evaluation.jsonl were made.

    What has its usual value is left out.
    """
    usual = {"mode": "ode", "heun": False, "cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0,
             "global_seed": 0, "labels": "balanced", "ema": True, "cache": "none"}  # fmt: skip
    others = [
        f"{shown(name)} {shown(value)}"
        for name, value in record.items()
        if name not in _MEASURED and name != "num_steps" and usual.get(name, "") != value
    ]
    return ", ".join([f"{shown(record.get('num_steps', '?'))} steps", *others])


def samples_quality(entry: Any) -> Quality | None:
    """An entry of samples/<step>-...-evaluation.json; None if it is something else. One without metrics or of a
    checkpoint without a step is passed over."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("settings"), Mapping):
        return None
    settings, metrics = entry["settings"], entry.get("metrics", {})
    if not isinstance(metrics, Mapping):
        return None
    stem, _, sampling = str(settings.get("samples", "")).partition("-")
    if not _STEP.fullmatch(stem):
        return Quality("", 0, {})
    values = {
        key: finite(metric.get("value"))
        for key, metric in metrics.items()
        if key in NAMES and isinstance(metric, Mapping)
    }
    count, network, reference = (shown(settings.get(name, "?")) for name in ("count", "network", "reference"))
    how = f"{count} samples ({shown(sampling)}); features of {network} against {reference}"
    return Quality(how, int(stem), {key: value for key, value in values.items() if value is not None})


def settings_measured(runs: Iterable[Run]) -> list[str]:
    """Every `how` of any run, those that most runs have first."""
    counts: dict[str, int] = {}
    for run in runs:
        for how in {quality.how for quality in run.quality}:
            counts[how] = counts.get(how, 0) + 1
    return sorted(counts, key=lambda how: -counts[how])


# ---- the page ----

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
