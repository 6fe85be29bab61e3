"""Tables of text, for a terminal and in Markdown, and the numbers in their cells."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"


def text_table(rows: Sequence[Sequence[str]], align: str = "<>") -> str:
    """Align rows in columns, two spaces apart; `align` has < or > for each column, the last for all that follow."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align + align[-1] * len(widths)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of which the first is the header; the first column to the left, the others to the right."""
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines]) + "\n"


def known_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Header and rows without the columns of which nothing is known."""
    known = [column for column in range(len(header)) if any(row[column] != NONE for row in rows)]
    return [[line[column] for column in known] for line in [header, *rows]]


def format_number(value: float | None, digits: int, scale: float = 1.0, spread: float | None = None) -> str:
    """'1,234.50', '0.012 ± 0.002' where there is a spread, or a dash for what is not known."""
    if value is None:
        return NONE
    text = f"{scale * value:,.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:,.{digits}f}"
