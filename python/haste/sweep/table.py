"""The table of a sweep, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from haste.sweep.points import long_name
from haste.sweep.rows import Row

MIB = 2**20
NONE = "–"

LEGEND = """\
Times are the model's and the sampler's alone, the median of the turns; FLOPs are those of matrix products and
convolutions (torch.utils.flop_counter; elementwise work and the operations of haste_ext count nothing). The two
speed-ups are over the first row, and "kept" is the first over the second. Memory is a batch's: the snapshots, and the
peak beyond the weights, which on the CPU is Linux's count and scatters by some MiB. PSNR and SSIM are with the pictures
that the first row draws from the same noise."""

HEAD = ("setting", "full", "ms/picture", "speed-up", "GFLOPs", "FLOPs speed-up", "kept", "cache MiB", "peak MiB",
        "distance", "accuracy %", "PSNR dB", "SSIM")  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """A table with a row per point; columns of which nothing is known are left out."""
    head, *lines = cells(rows)
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *lines]) + "\n"


def plain_text(rows: Sequence[Row]) -> str:
    """The same in columns of equal width."""
    lines = cells(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def cells(rows: Sequence[Row]) -> list[list[str]]:
    table = [list(HEAD), *(row_cells(row) for row in rows)]
    known = [column for column in range(len(HEAD)) if any(line[column] != NONE for line in table[1:])]
    return [[line[column] for column in known] for line in table]


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
        number(row.peak_bytes, 0, 1 / MIB),
        number(row.distance, 3, spread=row.distance_spread),
        number(row.accuracy, 1, 100.0, spread=row.accuracy_spread),
        number(row.psnr, 1),
        number(row.ssim, 3),
    ]


def number(value: float | None, digits: int, scale: float = 1.0, spread: float | None = None) -> str:
    if value is None:
        return NONE
    text = f"{scale * value:,.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:,.{digits}f}"
