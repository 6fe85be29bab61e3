"""What a sweep has measured: its records on the disk, the rows made of them, their table, and what it recommends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import truediv
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.io import LARGEST_JSON, parse_json, read_bytes, write_text
from haste.resumable import ResumableDir
from haste.sweep.config import long_name, point_key
from haste.tables import format_number, known_columns
from haste.validation import build, check

# ---- records ----

TABLE, PLOT = "sweep.md", "sweep.png"

Record = dict[str, Any]


@dataclass
class _BegunRecord:
    """The fields of a record that are read before its point is complete."""

    sweep: dict[str, Any]
    point: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)


class SweepDir(ResumableDir):
    """The folder of a sweep, with a record of each point in sweep.jsonl.

    A record is {"sweep": what its points share, "point": what tells them apart, and what was measured}. `sweep` holds
    the name and digest of the checkpoint, the settings that all points share, the number of images, the batch, what
    they were evaluated by, and the machine: points are compared only where all of that is equal. A file can hold
    several sweeps.
    """

    flag = "--output"
    content = "a sweep"
    record_name = "sweep.jsonl"

    def __init__(self, path: Path) -> None:
        self._records: dict[str, Record] = {}
        super().__init__(path, {})

    def reopen(self) -> None:
        """Read the records."""
        self._records = {}
        if not self.record.is_file():
            super().reopen()
            return
        for number, line in enumerate(read_bytes(self.record, LARGEST_JSON).splitlines(), start=1):
            source = f"line {number} of {self.record}"
            record = parse_json(line, source, "a record of haste sweep", needs=("sweep", "point"))
            build(_BegunRecord, record, source)
            self._records[_key(record["sweep"], record["point"])] = record

    def may_begin(self) -> bool:
        """Whether a folder without records may be filled: one without a table or a plot of another sweep."""
        return not any((self.path / name).exists() for name in (TABLE, PLOT))

    def find(self, sweep: Record, point: Record) -> Record:
        """The record of a point; one without measurements if there is none."""
        return self._records.get(_key(sweep, point), {"sweep": sweep, "point": point})

    def rename(self, before: Record, sweep: Record) -> None:
        """Move the records of the sweep `before` to `sweep`, except where that has its own."""
        for record in [record for record in self._records.values() if record["sweep"] == before]:
            del self._records[_key(before, record["point"])]
            self._records.setdefault(_key(sweep, record["point"]), {**record, "sweep": sweep})

    def add(self, sweep: Record, point: Record, **measured: Any) -> None:
        """Add measurements to the record of a point, and write the file."""
        self._records[_key(sweep, point)] = {**self.find(sweep, point), **measured}
        text = "".join(json.dumps(record) + "\n" for record in self._records.values())
        self.path.mkdir(parents=True, exist_ok=True)
        with self.writing():
            write_text(self.record, text)

    def complete(self, sweep: Record | None = None) -> list[Record]:
        """The complete records of one sweep, in the order in which they were begun; None: of the file's last sweep."""
        records = [record for record in self._records.values() if record.get("seconds")]
        if sweep is None:
            sweep = records[-1]["sweep"] if records else {}
        return [record for record in records if record["sweep"] == sweep]


def _key(sweep: Record, point: Record) -> str:
    return json.dumps([sweep, point], sort_keys=True)


# ---- rows ----


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of a point that its record and its row share.

    Args:
        flops: per image.
        peak_bytes, cache_bytes: of a batch; see `haste.sweep.measure.count_cost`.
        calls, full_calls: of the model, per image.
        fd: None for a pipeline.
        psnr, ssim: fidelity to the images of the reference; None for the reference itself.
    """

    flops: float
    peak_bytes: int | None
    cache_bytes: int
    calls: int
    full_calls: int
    fd: float | None
    label_accuracy: float | None
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One point of the table.

    Args:
        seconds: per image, the median of the turns.
        speedup: over the reference, which is the longest uncached run; the median of the ratios within a turn.
        flops_speedup: over the reference.
        fd_spread, label_accuracy_spread: standard deviations over sweeps, where there are several.
    """

    settings: SamplingConfig
    seconds: float
    speedup: float
    flops_speedup: float
    fd_spread: float | None = None
    label_accuracy_spread: float | None = None

    @property
    def uncached(self) -> bool:
        """Whether every step is full: the baseline."""
        return self.settings.cache == "none"

    @property
    def kept(self) -> float:
        """Speed-up in seconds over speed-up in FLOPs."""
        return self.speedup / self.flops_speedup


@dataclass(frozen=True, kw_only=True)
class _CompleteRecord(Measured):
    seconds: list[float]
    reference_seconds: list[float]


def make_rows(records: Sequence[Record]) -> list[Row]:
    """Make the rows of one sweep: the reference, the other uncached runs by their steps, then the cached points.

    Raises:
        UserError: no uncached run is among the records, or one is not a record of a sweep.
    """
    points = [(_checked_settings(record), record) for record in records]
    uncached = sorted((p for p in points if p[0].cache == "none"), key=lambda point: -point[0].num_steps)
    if not uncached:
        raise UserError("records of a sweep must hold an uncached run, got none")
    reference = uncached[0][1]
    return [
        Row(
            settings=settings,
            seconds=median(record["seconds"]),
            speedup=median(map(truediv, record["reference_seconds"], record["seconds"])),
            flops_speedup=reference["flops"] / record["flops"],
            **{measured.name: record[measured.name] for measured in fields(Measured)},
        )
        for settings, record in [*uncached, *(point for point in points if point[0].cache != "none")]
    ]


def _checked_settings(record: Record) -> SamplingConfig:
    """The settings of a record's point. Raises UserError for values of other types, and for a run of no time."""
    source = "a record of haste sweep"
    measured = build(_CompleteRecord, record, source)
    paired = len(measured.seconds) == len(measured.reference_seconds) > 0
    if not paired or min(*measured.seconds, *measured.reference_seconds, measured.flops) <= 0:
        raise UserError(f"{source} must hold as many seconds as reference_seconds, and FLOPs, all above 0")
    shared = check(record["sweep"].get("settings"), dict[str, Any], f"settings of {source}")
    return build(SamplingConfig, {**shared, **record["point"]}, f"settings of {source}")


def average(sweeps: Sequence[Sequence[Row]]) -> list[Row]:
    """Average the points that all of these sweeps have: medians of times, means of the other measurements.

    With standard deviations (n − 1) of FD and label accuracy, if there are several sweeps.
    """
    by_point = [{point_key(row.settings): row for row in rows} for rows in sweeps]
    shared = [key for key in by_point[0] if all(key in rows for rows in by_point)]
    return [_average_row([rows[key] for rows in by_point]) for key in shared]


def _average_row(rows: Sequence[Row]) -> Row:
    def over(name: str, statistic: Callable[[list[float]], float]) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistic(values)

    averages = {name: over(name, median) for name in ("seconds", "speedup")}
    averages |= {name: over(name, mean) for name in ("fd", "label_accuracy", "psnr", "ssim", "peak_bytes")}
    if len(rows) > 1:
        averages |= {f"{name}_spread": over(name, stdev) for name in ("fd", "label_accuracy")}
    return replace(rows[0], **averages)  # type: ignore[arg-type]


# ---- the table ----

MIB = 2**20

PIPELINE_LEGEND = """\
Times are those of whole calls of the pipeline, from prompt to image, the median of the turns; FLOPs, of one image, are
those of matrix products and convolutions (torch.utils.flop_counter; elementwise work and the operations of haste_ext
count nothing). The two speed-ups are over the first row, and "kept" is the first over the second. Memory is an image's:
the cached features, and the peak beyond the weights, which on the CPU is Linux's count and scatters by some MiB. PSNR
and SSIM are with the images of the first row, from the same prompts and noise. A row without them has the same images,
or is the first."""

LEGEND = """\
Times are the model's and the sampler's alone, the median of the turns; FLOPs are those of matrix products and
convolutions (torch.utils.flop_counter; elementwise work and the operations of haste_ext count nothing). The two
speed-ups are over the first row, and "kept" is the first over the second. Memory is a batch's: the cached features,
and the peak beyond the weights, which on the CPU is Linux's count and scatters by some MiB. PSNR and SSIM are with the
images that the first row samples from the same noise."""

HEAD = ("setting", "full", "ms/image", "speed-up", "GFLOPs", "FLOPs speed-up", "kept", "cache MiB", "peak MiB",
        "FD", "label accuracy %", "PSNR dB", "SSIM")  # fmt: skip


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The header and a row per point, without columns of which nothing is known."""
    cells = [
        [
            long_name(row.settings),
            f"{row.full_calls}/{row.calls}",
            format_number(row.seconds, 2, 1e3),
            f"{row.speedup:.2f}×",
            format_number(row.flops, 2, 1e-9),
            f"{row.flops_speedup:.2f}×",
            f"{row.kept:.2f}",
            format_number(row.cache_bytes, 1, 1 / MIB),
            format_number(row.peak_bytes, 0, 1 / MIB),
            format_number(row.fd, 3, spread=row.fd_spread),
            format_number(row.label_accuracy, 1, 100.0, spread=row.label_accuracy_spread),
            format_number(row.psnr, 1),
            format_number(row.ssim, 3),
        ]
        for row in rows
    ]
    return known_columns(HEAD, cells)


# ---- advice ----

ACCURACY_MARGIN = 0.01  # how far label accuracy may be below the reference's
SAME_SPEED = 0.05  # settings whose seconds differ by no more than this are ordered by their fidelity


def known_fd(row: Row) -> float:
    """FD, where there must be one."""
    assert row.fd is not None
    return row.fd


def front(rows: Sequence[Row], loss: Callable[[Row], float]) -> list[Row]:
    """The Pareto front, fastest first: the rows than which no other is both faster and lower in `loss`."""
    chosen: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, loss(row))):
        if not chosen or loss(row) < loss(chosen[-1]):
            chosen.append(row)
    return chosen


def good_enough(row: Row, reference: Row, tolerance: float) -> bool:
    """Whether FD is at most 1 + tolerance times the reference's, and label accuracy, if known, within a point of it."""
    accuracy, wanted = row.label_accuracy, reference.label_accuracy
    reads = accuracy is None or wanted is None or accuracy >= wanted - ACCURACY_MARGIN
    return reads and known_fd(row) <= (1 + tolerance) * known_fd(reference)


def worth_its_cache(row: Row, rows: Sequence[Row]) -> bool:
    """Whether fidelity, if known, is above that of every uncached run that is as fast."""
    psnr = row.psnr
    rivals = [other.psnr for other in rows if other.uncached and other.seconds <= row.seconds]
    return psnr is None or all(rival < psnr for rival in rivals if rival is not None)


def recommend(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The fastest cached row that is good enough and worth its cache; of those about as fast, the one of best fidelity.

    The first row is the reference. None if there is no such row, or no FD.
    """
    if rows[0].fd is None:
        return None
    fit = [
        row for row in rows if not row.uncached and good_enough(row, rows[0], tolerance) and worth_its_cache(row, rows)
    ]
    limit = (1 + SAME_SPEED) * min((row.seconds for row in fit), default=0.0)
    as_fast = [row for row in fit if row.seconds <= limit]
    return max(as_fast, key=lambda row: (row.psnr or 0.0, -row.seconds), default=None)


def advise(rows: Sequence[Row], tolerance: float) -> str:
    """Sentences on the Pareto fronts and the recommended setting; the first row is the reference."""
    reference = rows[0]
    sentences = [] if reference.fd is None else [_front_sentence("FD", front(rows, known_fd))]
    compared = [row for row in rows if row.psnr is not None]
    if compared:
        sentences.append(_front_sentence("fidelity to the full run", front(compared, lambda row: -(row.psnr or 0.0))))
    if reference.fd is None:
        return " ".join([*sentences, _worth_sentence(compared)])
    bar = f"an FD within {tolerance:.0%} of {reference.fd:.3g}, that of {long_name(reference.settings)}"
    chosen = recommend(rows, tolerance)
    if chosen is None:
        sentences.append(f"No cached setting has {bar}, and has a higher fidelity than uncached runs that are as fast.")
    else:
        sentences.append(f"Recommended, the fastest cached setting with {bar}, that has a higher fidelity than "
                         f"uncached runs as fast: {describe(chosen)}.")  # fmt: skip
    uncached = [row for row in rows if row.uncached and good_enough(row, reference, tolerance)]
    fastest = min(uncached, key=lambda row: row.seconds)
    return " ".join([*sentences, f"The fastest uncached run with such an FD: {describe(fastest)}."])


def _front_sentence(what: str, rows: Sequence[Row]) -> str:
    cached = [long_name(row.settings) for row in rows if not row.uncached]
    if not cached:
        return f"No cached setting is on the Pareto front of seconds and {what}."
    return f"On the Pareto front of seconds and {what}, fastest first: {'; '.join(cached)}."


def _worth_sentence(rows: Sequence[Row]) -> str:
    """Which cached settings are closer to the full run than uncached runs that are as fast."""
    worth = [row for row in rows if not row.uncached and worth_its_cache(row, rows)]
    if not worth:
        return "No cached setting is closer to the full run than uncached runs that are as fast."
    names = "; ".join(map(describe, sorted(worth, key=lambda row: row.seconds)))
    return f"Closer to the full run than uncached runs that are as fast, fastest first: {names}."


def describe(row: Row) -> str:
    """'Taylor per module, interval 4, order 2, 50 steps (2.10× as fast, FD 3.1, 30.2 dB)'."""
    fd = "" if row.fd is None else f", FD {row.fd:.3g}"
    fidelity = "" if row.psnr is None else f", {row.psnr:.1f} dB"
    return f"{long_name(row.settings)} ({row.speedup:.2f}× as fast{fd}{fidelity})"
