"""The numbers of a table, from records alone: one row per point, or per point over several sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median, stdev
from typing import Any

from haste.errors import UserError
from haste.generation.settings import SamplingSettings
from haste.plain import build, check
from haste.sweep.points import point_key


@dataclass(frozen=True)
class Row:
    """One point.

    seconds, flops: per picture. peak_bytes, cache_bytes: of a batch, as `haste.sweep.cost` measures them.
    speedup, flops_speedup: over the reference, the longest full run; in seconds the median of ratios within a turn.
    distance and accuracy: as `haste.sweep.quality` has them, and their standard deviations over sweeps, if several.
    psnr, ssim: agreement with the pictures of the reference; None for the reference itself.
    """

    settings: SamplingSettings
    seconds: float
    speedup: float
    flops: float
    flops_speedup: float
    peak_bytes: int | None
    cache_bytes: int
    calls: int
    full_calls: int
    distance: float
    accuracy: float | None
    psnr: float | None
    ssim: float | None
    distance_spread: float | None = None
    accuracy_spread: float | None = None

    @property
    def plain(self) -> bool:
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
    plain = [index for index, own in enumerate(settings) if own.cache == "none"]
    if not plain:
        raise UserError("the records hold no full run to compare with; let haste sweep measure one")
    plain.sort(key=lambda index: -settings[index].num_steps)
    cached = [index for index, own in enumerate(settings) if own.cache != "none"]
    reference = records[plain[0]]
    return [make_row(settings[index], records[index], reference) for index in plain + cached]


@dataclass
class _Measured:
    """What a record of a complete point holds, which may come from a file."""

    seconds: list[float]
    reference_seconds: list[float]
    flops: float
    peak_bytes: int | None
    cache_bytes: int
    calls: int
    full_calls: int
    distance: float
    accuracy: float | None
    psnr: float | None
    ssim: float | None


def _checked_settings(record: dict[str, Any]) -> SamplingSettings:
    """The settings of a record's point. UserError for a record of other types, or of a run that took no time."""
    source = "a record of haste sweep"
    measured = build(_Measured, record, source)
    paired = len(measured.seconds) == len(measured.reference_seconds) > 0
    if not paired or min(*measured.seconds, *measured.reference_seconds, measured.flops) <= 0:
        raise UserError(f"{source} must hold as many seconds as reference_seconds, and FLOPs, all above 0")
    shared = check(record["sweep"].get("settings"), dict[str, Any], f"settings of {source}")
    return build(SamplingSettings, {**shared, **record["point"]}, f"settings of {source}")


def make_row(settings: SamplingSettings, record: dict[str, Any], reference: dict[str, Any]) -> Row:
    names = ("flops", "peak_bytes", "cache_bytes", "calls", "full_calls", "distance", "accuracy", "psnr", "ssim")
    ratios = [full / own for full, own in zip(record["reference_seconds"], record["seconds"], strict=True)]
    return Row(
        settings=settings,
        seconds=median(record["seconds"]),
        speedup=median(ratios),
        flops_speedup=reference["flops"] / record["flops"],
        **{name: record[name] for name in names},
    )


def average(sweeps: Sequence[Sequence[Row]]) -> list[Row]:
    """The points that every one of these sweeps has: medians of the times, means of all else.

    With standard deviations (n − 1) of distance and accuracy, if there are several sweeps.
    """
    by_point = [{point_key(row.settings): row for row in rows} for rows in sweeps]
    shared = [key for key in by_point[0] if all(key in rows for rows in by_point)]
    return [average_row([rows[key] for rows in by_point]) for key in shared]


def average_row(rows: Sequence[Row]) -> Row:
    def over(name: str, statistic=mean):
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistic(values)

    medians = {name: over(name, median) for name in ("seconds", "speedup")}
    means = ("distance", "accuracy", "psnr", "ssim", "peak_bytes")
    spreads = {f"{name}_spread": over(name, stdev) for name in ("distance", "accuracy")} if len(rows) > 1 else {}
    return replace(rows[0], **medians, **{name: over(name) for name in means}, **spreads)
