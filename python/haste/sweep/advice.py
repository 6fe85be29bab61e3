"""What a sweep recommends: the settings that nothing beats, and the fastest that is good enough and worth its cache.

The table of a sweep, as Markdown and for a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from haste.sweep.config import long_name
from haste.sweep.records import Row
from haste.tables import format_number, known_columns

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
