"""The picture, drawn from the JSON document alone: time and peak memory of every variant over those of plain SiT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from haste.evaluation.style import LIGHT, save, styled
from matplotlib.axes import Axes
from report import PLAIN, ratios, title

from haste_ext.bench.measure import spread

ROW_INCHES = 0.32


def draw(document: Mapping, path: Path) -> None:
    """One line of two panels per case."""
    results = document["results"]
    height = sum(0.9 + ROW_INCHES * len(result["rows"]) for result in results)
    with styled(LIGHT):
        figure, grid = plt.subplots(len(results), 2, squeeze=False, figsize=(11.0, height), sharey="row")
        for (left, right), result in zip(grid, results, strict=True):
            draw_case(left, right, result)
        figure.tight_layout(w_pad=2.0, h_pad=2.0)
        save(figure, path)


def draw_case(left: Axes, right: Axes, result: Mapping) -> None:
    rows = [row for row in result["rows"] if row["name"] != PLAIN]
    plain = next(row for row in result["rows"] if row["name"] == PLAIN)
    times = [spread(ratios(result, row)) if "seconds" in row else None for row in rows]
    peaks = [row["peak_bytes"] / plain["peak_bytes"] if row.get("peak_bytes") else None for row in rows]
    bars(left, rows, [time and time["median"] for time in times])
    for place, time in enumerate(times):
        if time is not None:
            left.plot([time["p20"], time["p80"]], [place, place], color=LIGHT.text, linewidth=1.2)
    bars(right, rows, peaks)
    left.set_title(f"{title(result)}\nTime of a step over plain's (line: p20 – p80)")
    right.set_title("\nPeak memory over plain's")
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.invert_yaxis()


def bars(axes: Axes, rows: Sequence[Mapping], values: Sequence[float | None]) -> None:
    """A bar per row with its number at its foot; eager code in another colour, what is absent said in words."""
    ours, eager = LIGHT.series[:2]
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}  # x in shares of the panel
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            axes.text(0.02, place, row.get("absent", "not measured"), color=LIGHT.muted, **style)
            continue
        axes.barh(place, value, height=0.66, color=eager if row["name"].startswith("eager") else ours, alpha=0.85)
        axes.text(0.02, place, f"{value:.3f}", color=LIGHT.background, fontweight="bold", **style)
    axes.axvline(1.0, color=LIGHT.text, linewidth=1.0, linestyle="--")
    axes.grid(axis="y", visible=False)
