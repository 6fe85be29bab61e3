"""What a sweep recommends: the settings that nothing beats, and the fastest that is good enough and worth its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from haste.sweep.points import long_name
from haste.sweep.rows import Row

ACCURACY_MARGIN = 0.01  # so much below the reference's the share of rightly read pictures may be
AS_FAST = 0.05  # settings whose seconds differ by no more than this are told apart by their agreement


def front(rows: Sequence[Row], loss: Callable[[Row], float]) -> list[Row]:
    """The Pareto front, fastest first: the rows than which no other is both faster and lower in `loss`."""
    chosen: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, loss(row))):
        if not chosen or loss(row) < loss(chosen[-1]):
            chosen.append(row)
    return chosen


def good_enough(row: Row, reference: Row, tolerance: float) -> bool:
    """Whether its distance is at most 1 + tolerance times the reference's.

    Where accuracy is known it may not be more than a percentage point below the reference's either.
    """
    reads = row.accuracy is None or row.accuracy >= reference.accuracy - ACCURACY_MARGIN
    return reads and row.distance <= (1 + tolerance) * reference.distance


def worth_its_cache(row: Row, rows: Sequence[Row]) -> bool:
    """Whether every plain run that is as fast is further from the reference's pictures, where agreement is known."""
    if row.psnr is None:
        return True
    rivals = [other for other in rows if other.plain and other.psnr is not None and other.seconds <= row.seconds]
    return all(other.psnr < row.psnr for other in rivals)


def recommend(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The fastest cached row that is good enough and worth its cache; of those about as fast, the one that agrees best.

    The first row is the reference. None if no row is.
    """
    fit = [
        row for row in rows if not row.plain and good_enough(row, rows[0], tolerance) and worth_its_cache(row, rows)
    ]
    if not fit:
        return None
    limit = (1 + AS_FAST) * min(row.seconds for row in fit)
    return max((row for row in fit if row.seconds <= limit), key=lambda row: (row.psnr or 0.0, -row.seconds))


def advise(rows: Sequence[Row], tolerance: float) -> str:
    """Sentences; the first row is the reference."""
    reference = rows[0]
    sentences = [front_sentence("the distance", front(rows, lambda row: row.distance))]
    agreeing = [row for row in rows if row.psnr is not None]
    if agreeing:
        sentences.append(front_sentence("agreement with the full run", front(agreeing, lambda row: -row.psnr)))
    bar = f"a distance within {tolerance:.0%} of {reference.distance:.3g}, that of {long_name(reference.settings)}"
    plain = min((row for row in rows if row.plain and good_enough(row, reference, tolerance)), key=lambda r: r.seconds)
    chosen = recommend(rows, tolerance)
    if chosen is None:
        sentences.append(f"No cached setting has {bar}, and agrees better than plain runs that are as fast.")
    else:
        sentences.append(
            f"Recommended, the fastest cached setting with {bar}, that agrees better than plain runs as fast: "
            f"{describe(chosen)}."
        )
    return " ".join([*sentences, f"The fastest plain run with such a distance: {describe(plain)}."])


def front_sentence(what: str, rows: Sequence[Row]) -> str:
    cached = [long_name(row.settings) for row in rows if not row.plain]
    if not cached:
        return f"No cached setting is on the Pareto front of seconds and {what}."
    return f"On the Pareto front of seconds and {what}, fastest first: {'; '.join(cached)}."


def describe(row: Row) -> str:
    agreement = "" if row.psnr is None else f", {row.psnr:.1f} dB"
    return f"{long_name(row.settings)} ({row.speedup:.2f}× as fast, distance {row.distance:.3g}{agreement})"
