"""What a run's folder tells a report: log, settings, samples, and what `haste evaluate` has measured.

Everything here was written by somebody else, perhaps by an earlier version, perhaps half: what cannot be used is left
out and said in a sentence on the page.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError, in_one_line
from haste.evaluation.evaluate import NAMES
from haste.evaluation.runs import RECORDS, read_evaluations
from haste.io import read_json
from haste.resumable import read_lines
from haste.training.checkpoint import DIGEST, WRITTEN
from haste.training.logging import alignment_end, finite, is_step, read_log
from haste.training.samples import MISSING

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


# ---- what was measured ----


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
