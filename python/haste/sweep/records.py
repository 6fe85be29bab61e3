"""The records of a sweep on the disk, the rows made of them, their table, and what a sweep recommends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.io import LARGEST_JSON, parse_json, read_bytes, write_text, writing
from haste.sweep.config import long_name, point_key
from haste.tables import format_number, known_columns
from haste.validation import build, check

# ---- records ----

Record = dict[str, Any]


@dataclass
class _Kept:
    """Of a record in a file what is read whether the point is complete or not."""

    sweep: dict[str, Any]
    point: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)


class RecordBook:
    """The lines of a sweep.jsonl.

    A record is {"sweep": what its points share, "point": what tells it apart, and what was measured}. `sweep` holds
    the checkpoint's name and digest, the settings that all points share, the number of images, the batch, what they
    were evaluated by and the machine: points are compared only where all of that is equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        lines = read_bytes(path, LARGEST_JSON).splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            record = parse_json(line, f"line {number} of {path}", "a record of haste sweep", needs=("sweep", "point"))
            build(_Kept, record, f"line {number} of {path}")
            self._records[key(record["sweep"], record["point"])] = record

    def find(self, sweep: Record, point: Record) -> Record:
        """The record of a point; an empty one if nothing is known of it."""
        return self._records.get(key(sweep, point), {"sweep": sweep, "point": point})

    def rename(self, before: Record, sweep: Record) -> None:
        """Have the records of the sweep `before`, where there are none of `sweep` itself, be of that."""
        renamed = [record for record in self._records.values() if record["sweep"] == before]
        for record in renamed:
            del self._records[key(before, record["point"])]
            self._records.setdefault(key(sweep, record["point"]), {**record, "sweep": sweep})

    def keep(self, sweep: Record, point: Record, **measured: Any) -> None:
        """Add what was measured of a point to its record, on the disk as well."""
        self._records[key(sweep, point)] = {**self.find(sweep, point), **measured}
        text = "".join(json.dumps(record) + "\n" for record in self._records.values())
        with writing(str(self.path), "what was measured before is kept, and the same command resumes"):
            write_text(self.path, text)

    def of(self, sweep: Record | None = None) -> list[Record]:
        """The complete records of one sweep, in the order in which they were begun; None: of the last in the file."""
        records = [record for record in self._records.values() if record.get("seconds")]
        if sweep is None:
            sweep = records[-1]["sweep"] if records else {}
        return [record for record in records if record["sweep"] == sweep]


def key(sweep: Record, point: Record) -> str:
    return json.dumps([sweep, point], sort_keys=True)


# ---- rows ----


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a point, which its record holds.

    flops: per image. peak_bytes, cache_bytes: of a batch, as `haste.sweep.measure` measures them.
    fd, label_accuracy: as `haste.sweep.measure` has them.
    psnr, ssim: fidelity to the images of the reference; None for the reference itself.
    """

    flops: float
    peak_bytes: int | None
    cache_bytes: int
    calls: int
    full_calls: int
    fd: float
    label_accuracy: float | None
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One point of the table.

    seconds: per image. speedup, flops_speedup: over the reference, the longest full run; in seconds the median of
    ratios within a turn. fd_spread, label_accuracy_spread: standard deviations over sweeps, if there are several.
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
        """Speed-up in seconds over speed-up in FLOPs: how much of what was saved on paper came out."""
        return self.speedup / self.flops_speedup


def make_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of one sweep: the reference, the other full runs by their steps, then the cached points.

    Raises UserError if no full run is among the records, or if one is not what a sweep has kept.
    """
    settings = [_checked_settings(record) for record in records]
    uncached = [index for index, own in enumerate(settings) if own.cache == "none"]
    if not uncached:
        raise UserError("the records hold no full run to compare with; let haste sweep measure one")
    uncached.sort(key=lambda index: -settings[index].num_steps)
    cached = [index for index, own in enumerate(settings) if own.cache != "none"]
    reference = records[uncached[0]]
    return [make_row(settings[index], records[index], reference) for index in uncached + cached]


@dataclass(frozen=True, kw_only=True)
class _TimedRecord(Measured):
    """A record of a complete point, which may come from a file."""

    seconds: list[float]
    reference_seconds: list[float]


def _checked_settings(record: dict[str, Any]) -> SamplingConfig:
    """The settings of a record's point. UserError for a record of other types, or of a run that took no time."""
    source = "a record of haste sweep"
    measured = build(_TimedRecord, record, source)
    paired = len(measured.seconds) == len(measured.reference_seconds) > 0
    if not paired or min(*measured.seconds, *measured.reference_seconds, measured.flops) <= 0:
        raise UserError(f"{source} must hold as many seconds as reference_seconds, and FLOPs, all above 0")
    shared = check(record["sweep"].get("settings"), dict[str, Any], f"settings of {source}")
    return build(SamplingConfig, {**shared, **record["point"]}, f"settings of {source}")


def make_row(settings: SamplingConfig, record: dict[str, Any], reference: dict[str, Any]) -> Row:
    ratios = [full / own for full, own in zip(record["reference_seconds"], record["seconds"], strict=True)]
    return Row(
        settings=settings,
        seconds=median(record["seconds"]),
        speedup=median(ratios),
        flops_speedup=reference["flops"] / record["flops"],
        **{measured.name: record[measured.name] for measured in fields(Measured)},
    )


def average(sweeps: Sequence[Sequence[Row]]) -> list[Row]:
    """The points that every one of these sweeps has: medians of the times, means of all else.

    With standard deviations (n − 1) of FD and label accuracy, if there are several sweeps.
    """
    by_point = [{point_key(row.settings): row for row in rows} for rows in sweeps]
    shared = [key for key in by_point[0] if all(key in rows for rows in by_point)]
    return [average_row([rows[key] for rows in by_point]) for key in shared]


def average_row(rows: Sequence[Row]) -> Row:
    def over(name: str, statistic=mean):
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistic(values)

    medians = {name: over(name, median) for name in ("seconds", "speedup")}
    means = ("fd", "label_accuracy", "psnr", "ssim", "peak_bytes")
    spreads = {f"{name}_spread": over(name, stdev) for name in ("fd", "label_accuracy")} if len(rows) > 1 else {}
    return replace(rows[0], **medians, **{name: over(name) for name in means}, **spreads)


# ---- the table ----

MIB = 2**20

LEGEND = """\
Times are the model's and the sampler's alone, the median of the turns; FLOPs are those of matrix products and
convolutions (torch.utils.flop_counter; elementwise work and the operations of haste_ext count nothing). The two
speed-ups are over the first row, and "kept" is the first over the second. Memory is a batch's: the cached features,
and the peak beyond the weights, which on the CPU is Linux's count and scatters by some MiB. PSNR and SSIM are with the
images that the first row samples from the same noise."""

HEAD = ("setting", "full", "ms/image", "speed-up", "GFLOPs", "FLOPs speed-up", "kept", "cache MiB", "peak MiB",
        "FD", "accuracy %", "PSNR dB", "SSIM")  # fmt: skip


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The header and a row per point; columns of which nothing is known are left out."""
    return known_columns(HEAD, [row_cells(row) for row in rows])


def row_cells(row: Row) -> list[str]:
    return [
        long_name(row.settings),
        f"{row.full_calls}/{row.calls}",
        f"{1e3 * row.seconds:,.2f}",
        f"{row.speedup:.2f}×",
        f"{row.flops / 1e9:,.2f}",
        f"{row.flops_speedup:.2f}×",
        f"{row.kept:.2f}",
        f"{row.cache_bytes / MIB:,.1f}",
        format_number(row.peak_bytes, 0, 1 / MIB),
        format_number(row.fd, 3, spread=row.fd_spread),
        format_number(row.label_accuracy, 1, 100.0, spread=row.label_accuracy_spread),
        format_number(row.psnr, 1),
        format_number(row.ssim, 3),
    ]


# ---- advice ----

ACCURACY_MARGIN = 0.01  # so much below the reference's the share of rightly read images may be
AS_FAST = 0.05  # settings whose seconds differ by no more than this are told apart by their fidelity


def front(rows: Sequence[Row], loss: Callable[[Row], float]) -> list[Row]:
    """The Pareto front, fastest first: the rows than which no other is both faster and lower in `loss`."""
    chosen: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, loss(row))):
        if not chosen or loss(row) < loss(chosen[-1]):
            chosen.append(row)
    return chosen


def good_enough(row: Row, reference: Row, tolerance: float) -> bool:
    """Whether its FD is at most 1 + tolerance times the reference's.

    Where label accuracy is known it may not be more than a percentage point below the reference's either.
    """
    reads = row.label_accuracy is None or row.label_accuracy >= reference.label_accuracy - ACCURACY_MARGIN
    return reads and row.fd <= (1 + tolerance) * reference.fd


def worth_its_cache(row: Row, rows: Sequence[Row]) -> bool:
    """Whether every uncached run that is as fast is further from the reference's images, where fidelity is known."""
    if row.psnr is None:
        return True
    rivals = [other for other in rows if other.uncached and other.psnr is not None and other.seconds <= row.seconds]
    return all(other.psnr < row.psnr for other in rivals)


def recommend(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The fastest cached row that is good enough and worth its cache; of those about as fast, the one that agrees best.

    The first row is the reference. None if no row is.
    """
    fit = [
        row for row in rows if not row.uncached and good_enough(row, rows[0], tolerance) and worth_its_cache(row, rows)
    ]
    if not fit:
        return None
    limit = (1 + AS_FAST) * min(row.seconds for row in fit)
    return max((row for row in fit if row.seconds <= limit), key=lambda row: (row.psnr or 0.0, -row.seconds))


def advise(rows: Sequence[Row], tolerance: float) -> str:
    """Sentences; the first row is the reference."""
    reference = rows[0]
    sentences = [front_sentence("FD", front(rows, lambda row: row.fd))]
    compared = [row for row in rows if row.psnr is not None]
    if compared:
        sentences.append(front_sentence("fidelity to the full run", front(compared, lambda row: -row.psnr)))
    bar = f"an FD within {tolerance:.0%} of {reference.fd:.3g}, that of {long_name(reference.settings)}"
    uncached = min(
        (row for row in rows if row.uncached and good_enough(row, reference, tolerance)), key=lambda r: r.seconds
    )
    chosen = recommend(rows, tolerance)
    if chosen is None:
        sentences.append(f"No cached setting has {bar}, and has a higher fidelity than uncached runs that are as fast.")
    else:
        sentences.append(
            f"Recommended, the fastest cached setting with {bar}, that has a higher fidelity than uncached runs as "
            f"fast: {describe(chosen)}."
        )
    return " ".join([*sentences, f"The fastest uncached run with such an FD: {describe(uncached)}."])


def front_sentence(what: str, rows: Sequence[Row]) -> str:
    cached = [long_name(row.settings) for row in rows if not row.uncached]
    if not cached:
        return f"No cached setting is on the Pareto front of seconds and {what}."
    return f"On the Pareto front of seconds and {what}, fastest first: {'; '.join(cached)}."


def describe(row: Row) -> str:
    fidelity = "" if row.psnr is None else f", {row.psnr:.1f} dB"
    return f"{long_name(row.settings)} ({row.speedup:.2f}× as fast, FD {row.fd:.3g}{fidelity})"
