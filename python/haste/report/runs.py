"""The page of `haste report`: what the folders of runs hold, and the sections that show it.

A run's files may be of an earlier version, or cut short: what cannot be read is left out, and the page says so.
"""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from haste.errors import UserError, in_one_line
from haste.evaluation.checkpoints import READ, RECORDS
from haste.evaluation.records import read_evaluations
from haste.io import read_json
from haste.metrics.evaluator import NAMES, TITLES, Result
from haste.plotting import LOSSES
from haste.report.page import Panel, difference, exact_curve, number_text, smooth_curve, write_page
from haste.resumable import read_lines
from haste.tables import format_number
from haste.training.checkpoint import DIGEST, WRITTEN
from haste.training.config import TrainConfig
from haste.training.evaluation import SCORES
from haste.training.logging import alignment_end, finite, is_step, read_log
from haste.training.samples import MISSING

# ---- reading a run ----

IMAGE_SIDE = 520  # pixels on the page; larger images are made smaller
LARGEST_IMAGE = 64 * 2**20  # pixels
LONGEST = 200  # characters of a setting that are shown
_STEP = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True)
class Quality:
    """Metrics of one checkpoint.

    Args:
        how: what was measured, and against what; only metrics of the same `how` can be compared.
        values: by the keys of `haste.metrics.evaluator.NAMES`.
    """

    how: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A run of `haste train`, as its folder holds it.

    Args:
        folder: as it was given, for commands on the page.
        log: the lines of log.jsonl.
        samples: the image of each step, in the order of the steps.
        stop: the step at which alignment ended; None if it did not, or there was none.
        remarks: sentences on what cannot be read.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    samples: Mapping[int, Path]
    quality: Sequence[Quality]
    stop: int | None
    remarks: Sequence[str] = ()

    @property
    def steps(self) -> int:
        return self.log[-1]["step"]

    @property
    def aligned(self) -> bool:
        """Whether there was a teacher at any time."""
        return any(line["aligned"] for line in self.log)

    def setting(self, name: str, default: object = "") -> str:
        """A setting as text for a table."""
        return shown(self.settings.get(name, default))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have the value."""
        return [(line["step"], line[key]) for line in self.log if line.get(key) is not None]

    def median(self, key: str, aligned: bool) -> float | None:
        """The median over the lines with or without alignment, except the first line, which includes the warm-up."""
        values = [line[key] for line in self.log[1:] if line["aligned"] == aligned and line.get(key) is not None]
        return statistics.median(values) if values else None

    def last(self, key: str) -> float | None:
        """The mean over the last tenth of the log."""
        values = [line[key] for line in self.log[-max(1, len(self.log) // 10) :] if line.get(key) is not None]
        return statistics.mean(values) if values else None


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises UserError if no run has begun in it."""
    log, damaged = read_log(folder / "log.jsonl")
    if not log:
        raise UserError(f"RUNS must be the folder of a run, got {folder}, which has no log.jsonl")
    settings = read_json(folder / "args.json", "the settings of a run")
    name = shown(folder.resolve().name)
    remarks = [f"{name}: {damaged} lines of log.jsonl cannot be read and are left out."] if damaged else []
    quality, damaged = read_quality(folder)
    if damaged:
        remarks.append(f"{name}: {damaged} records of evaluations cannot be read and are left out.")
    images = [path for path in (folder / "samples").glob("*.png") if _STEP.fullmatch(path.stem)]
    if not images:
        remarks.append(f"{name} has no samples: {why_missing(folder)}.")
    samples = dict(sorted((int(path.stem), path) for path in images))
    return Run(folder, name, settings, log, samples, quality, alignment_end(log), remarks)


def shown(value: object) -> str:
    """Any value as text without control characters that UTF-8 can hold, shortened."""
    text = str(value).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def why_missing(folder: Path) -> str:
    """Why a run has no samples: the reason that the trainer has written, or the usual one."""
    path = folder / "samples" / MISSING
    if path.is_file():
        with path.open("rb") as file:
            return shown(file.read(1000).decode("utf-8", "replace").strip())
    return "it trained without --sampling-steps, or has not come to the first one"


def read_image(path: Path) -> np.ndarray:
    """A PNG file as (H, W, 3) uint8, at most IMAGE_SIDE pixels wide and high. Raises UserError for a damaged one."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            if file.width * file.height > LARGEST_IMAGE:
                raise ValueError(f"{file.width} x {file.height} pixels")
            image = file.convert("RGB")
    except Exception as error:  # a damaged file leads PIL to raise anything
        raise UserError(f"{path} is no whole PNG: {in_one_line(error)}") from error
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return np.asarray(image)


# ---- reading evaluations ----

_NOT_SAMPLING = {"step", "checkpoint", DIGEST, WRITTEN, "fd", "label_accuracy", READ, "samples", "seconds",
                 "evaluated_by", "num_steps"}  # fmt: skip
_USUAL: dict[str, tuple] = {
    "mode": ("ode", "ddim"), "heun": (False,), "timestep_spacing": ("linspace",), "cfg_scale": (1.0,),
    "guidance_low": (0.0,), "guidance_high": (1.0,), "global_seed": (0,), "labels": ("balanced",), "ema": (True,),
    "cache": ("none",),
}  # fmt: skip


def read_quality(folder: Path) -> tuple[list[Quality], int]:
    """The results of `haste evaluate` in a run's folder, the newest of each checkpoint, and how many are damaged."""
    try:
        records, damaged = read_lines(folder / RECORDS)
    except UserError:
        records, damaged = [], 1
    entries = [digits_quality(record) for record in records]
    for path in sorted((folder / "samples").glob("*-evaluation.json")):
        try:
            entries += [samples_quality(entry) for entry in read_evaluations(path)]
        except UserError:
            damaged += 1
    newest = {(quality.how, quality.step): quality for quality in entries if quality is not None and quality.values}
    return [newest[key] for key in sorted(newest)], damaged + entries.count(None)


def digits_quality(record: Mapping[str, Any]) -> Quality | None:
    """A line of evaluation.jsonl; None if it is something else. A checkpoint without a step has no values."""
    step, samples = record.get("step"), record.get("samples")
    if step is None and "checkpoint" in record:
        return Quality("", 0, {})
    if step is None or not is_step(step) or not is_step(samples):
        return None
    how = f"{samples:,} samples, {sampling_text(record)}; classifier of the digits against the real digits"
    found = record.get(READ)
    read = found if isinstance(found, dict) else {}
    values = {key: record.get(key) for key in ("fd", "label_accuracy")} | {key: read.get(key) for key in READ_NAMES}
    return Quality(how, step, finite_values(values))


def sampling_text(record: Mapping[str, Any]) -> str:
    """'25 steps, cfg_scale 1.5, cache taylor': how the samples of a line of evaluation.jsonl were made.

    Settings that have their usual value are left out.
    """
    others = [
        f"{shown(name)} {shown(value)}"
        for name, value in record.items()
        if name not in _NOT_SAMPLING and value not in _USUAL.get(name, ("",))
    ]
    return ", ".join([f"{shown(record.get('num_steps', '?'))} steps", *others])


def samples_quality(entry: Any) -> Quality | None:
    """An entry of samples/<step>-...-evaluation.json; None if it is something else.

    One without metrics, or of a checkpoint without a step, has no values.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("settings"), Mapping):
        return None
    settings, metrics = entry["settings"], entry.get("metrics", {})
    if not isinstance(metrics, Mapping):
        return None
    stem, _, sampling = str(settings.get("samples", "")).partition("-")
    if not _STEP.fullmatch(stem):
        return Quality("", 0, {})
    count, network, reference = (shown(settings.get(name, "?")) for name in ("count", "network", "reference"))
    relative = f", relative to {shown(settings['relative_to'])}" if "relative_to" in settings else ""
    how = f"{count} samples ({shown(sampling)}); features of {network} against {reference}{relative}"
    values = {key: metrics[key].get("value") for key in REPORTED if isinstance(metrics.get(key), Mapping)}
    return Quality(how, int(stem), finite_values(values))


def finite_values(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers."""
    return {key: number for key, value in values.items() if (number := finite(value)) is not None}


def measured_ways(runs: Sequence[Run]) -> list[str]:
    """Every `how` of any run, those that most runs have first."""
    counts = Counter(how for run in runs for how in dict.fromkeys(quality.how for quality in run.quality))
    return [how for how, _ in counts.most_common()]


# ---- the page ----

CURVES = {**LOSSES, "grad_norm": "Gradient norm", "images_per_second": "Images per second"}
DIFFERENCES = {key: title.partition(" (")[0] + ", difference" for key, title in LOSSES.items()}
EVALUATED_BY = ("evaluation_samples", "evaluation_features", "evaluation_reference")
SHOWN_SAMPLES = 4  # of each run, spread over its length
SHOWN_MEASUREMENTS = 4  # ways in which quality was measured
REPORTED = (*NAMES, "fdr")
LOWER_IS_BETTER = {"fd", "sfid", "kid", "fdr"}
READ_NAMES = {"seen_all": "read as asked for", "held_out_all": "the same of held-out combinations"}  # of prompts
PERCENT = {"label_accuracy", *READ_NAMES}
SHARES = {"precision", "recall", "coverage", *PERCENT}  # from 0 to 1


def write_report(runs: Sequence[Run], page: Path) -> None:
    """Write everything about these runs on one page that needs no other file."""
    own = asdict(TrainConfig())
    changed = [name for name in own if any(run.settings.get(name, own[name]) != own[name] for run in runs)]
    write_page(
        page,
        "report.html",
        compared=compare(runs),
        settings=[(f"--{name.replace('_', '-')}", *(run.setting(name) for run in runs)) for name in changed],
        remarks=[remark for run in runs for remark in run.remarks],
    )


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of templates/runs.html: quality, curves, samples and numbers of one run, or of several."""
    ways = measured_ways(runs)
    sampled = [run for run in runs if run.samples]
    steps, common = sampled_steps(sampled)
    return {
        "runs": runs,
        "names": [run.name for run in runs],
        "several": len(runs) > 1,
        "stops": alignment_stops(runs),
        "measurements": [measurement(runs, how) for how in ways[:SHOWN_MEASUREMENTS]],
        "hidden_measurements": len(ways[SHOWN_MEASUREMENTS:]),
        "evaluate_commands": [f"haste evaluate --run {shlex.quote(shown(run.folder))}" for run in runs[:2]],
        "curves": curve_panels(runs),
        "differences": difference_panels(runs),
        "samples": {
            "steps": steps,
            "common": common,
            "rows": [(run.name, [sample_image(run, step) for step in steps]) for run in sampled],
        },
        "numbers": [numbers(run) for run in runs],
    }


def alignment_stops(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """(run, step) where alignment ended."""
    return [(number, run.stop) for number, run in enumerate(runs) if run.stop is not None]


def measurement(runs: Sequence[Run], how: str) -> dict[str, Any]:
    """Plots and a table of every metric over checkpoints, all measured in one way."""
    values = {  # (run, step, metric)
        (number, quality.step, key): value
        for number, run in enumerate(runs)
        for quality in run.quality
        if quality.how == how
        for key, value in quality.values.items()
    }
    measured = sorted({number for number, _, _ in values})
    steps = sorted({step for _, step, _ in values})
    keys = [key for key in (*REPORTED, *READ_NAMES) if any(known == key for _, _, known in values)]
    stops = [(number, step) for number, step in alignment_stops(runs) if number in measured]
    panels = []
    for key in keys:
        scale = 100.0 if key in PERCENT else 1.0
        points = {n: [(step, scale * values[n, step, key]) for step in steps if (n, step, key) in values]
                  for n in measured}  # fmt: skip
        curves = [exact_curve(number, known) for number, known in points.items() if known]
        title = f"{metric_name(key)} ({'lower' if key in LOWER_IS_BETTER else 'higher'} is better)"
        bounds = (0.0, scale) if key in SHARES else (-np.inf, np.inf)
        panels.append(
            Panel(title, curves, steps[-1], points=True, log=key in ("fd", "sfid"), stops=stops, bounds=bounds)
        )

    def cell(number: int, step: int, key: str) -> str:
        value = values.get((number, step, key))
        return format_number(value, 1, 100.0) if key in PERCENT else str(Result(key, value))

    of_run = [f", {runs[number].name}" if len(runs) > 1 else "" for number in measured]
    return {
        "how": how,
        "panels": panels,
        "header": ["Step", *(metric_name(key) + name for key in keys for name in of_run)],
        "rows": [[f"{step:,}", *(cell(number, step, key) for key in keys for number in measured)] for step in steps],
    }


def metric_name(key: str) -> str:
    name = READ_NAMES.get(key) or TITLES[key]
    return (name if name[1:2].isupper() else name[0].upper() + name[1:]) + (", %" if key in PERCENT else "")


def curve_panels(runs: Sequence[Run]) -> list[Panel]:
    """A plot of each quantity that any run has logged, and of each score of evaluations while training."""
    panels = evaluation_panels(runs)
    for key, title in CURVES.items():
        points = {number: run.curve(key) for number, run in enumerate(runs)}
        curves = [smooth_curve(number, known, alone=len(runs) == 1) for number, known in points.items() if known]
        if curves:
            panels.append(Panel(title, curves, last_step(runs), stops=alignment_stops(runs)))
    return panels


def evaluation_panels(runs: Sequence[Run]) -> list[Panel]:
    """A plot of each score in the logs, for each way in which runs were evaluated while they trained."""
    ways = dict.fromkeys(evaluated_by(run) for run in runs)
    panels = []
    for how, key in itertools.product(ways, SCORES):
        scale = 100.0 if key in PERCENT else 1.0
        points = {number: [(step, scale * value) for step, value in run.curve(key)]
                  for number, run in enumerate(runs) if evaluated_by(run) == how}  # fmt: skip
        curves = [exact_curve(number, known) for number, known in points.items() if known]
        bounds = (0.0, scale) if key in SHARES else (-np.inf, np.inf)
        if curves:
            title = f"{metric_name(key)} ({how} while training)"
            log = key in ("fd", "sfid")
            stops = [stop for stop in alignment_stops(runs) if points.get(stop[0])]
            panels.append(Panel(title, curves, last_step(runs), points=True, log=log, stops=stops, bounds=bounds))
    return panels


def evaluated_by(run: Run) -> str:
    """'1000 samples' of a run on digits; of other data also the features and the reference."""
    own = asdict(TrainConfig())
    count, features, reference = (run.settings.get(name, own[name]) for name in EVALUATED_BY)
    against = "" if features is None else f" in {shown(features)} against {shown(reference or features)}"
    return f"{shown(count)} samples{against}"


def difference_panels(runs: Sequence[Run]) -> list[Panel]:
    """A plot of each loss that the first run shares with others: theirs minus its own."""
    panels = []
    for key, title in DIFFERENCES.items():
        base = runs[0].curve(key)
        points = {number: run.curve(key) for number, run in enumerate(runs) if number and base}
        found = (difference(number, known, base) for number, known in points.items() if known)
        curves = [curve for curve in found if curve is not None]
        if curves:
            panels.append(Panel(title, curves, last_step(runs), zero=True))
    return panels


def last_step(runs: Sequence[Run]) -> int:
    return max(run.steps for run in runs)


def sampled_steps(runs: Sequence[Run]) -> tuple[list[int], bool]:
    """A few steps at which all runs were sampled, and whether there are any; else at which any was."""
    if not runs:
        return [], True
    common = set.intersection(*(set(run.samples) for run in runs))
    steps = sorted(common or set().union(*(run.samples for run in runs)))
    chosen = np.unique(np.linspace(0, len(steps) - 1, SHOWN_SAMPLES).round().astype(int))
    return [steps[index] for index in chosen], bool(common)


def sample_image(run: Run, step: int) -> np.ndarray | str:
    """Samples of a run, or why there are none."""
    if step not in run.samples:
        return "none"
    try:
        return read_image(run.samples[step])
    except UserError:
        return "no whole PNG file"


def numbers(run: Run) -> list[str]:
    """The row of a run in the table of numbers."""
    ended = "no alignment" if not run.aligned else f"not by step {run.steps:,}" if run.stop is None else f"{run.stop:,}"
    return [
        run.name,
        f"{run.steps:,}",
        number_text(run.last("loss"), 4),
        ended,
        number_text(run.median("images_per_second", aligned=True), 1),
        number_text(run.median("images_per_second", aligned=False), 1),
        number_text(run.last("teraflops"), 3),
        number_text(run.last("mfu"), 3),
        number_text(run.last("peak_memory_gib"), 2),
        f"{sum(line.get('skipped_steps') or 0 for line in run.log):,.0f}",
    ]
