"""The figure, plotted from the JSON document alone: time and peak memory of every variant over vanilla."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from haste.plotting import LIGHT, save, styled
from matplotlib.axes import Axes
from report import VANILLA, ratios, title

from haste_ext.bench.measure import spread

ROW_INCHES = 0.32


def plot_cases(document: Mapping, path: Path) -> None:
    """One line of two panels per case."""
    results = document["results"]
    height = sum(0.9 + ROW_INCHES * len(result["rows"]) for result in results)
    with styled(LIGHT):
        figure, grid = plt.subplots(len(results), 2, squeeze=False, figsize=(11.0, height), sharey="row")
        for (left, right), result in zip(grid, results, strict=True):
            plot_case(left, right, result)
        figure.tight_layout(w_pad=2.0, h_pad=2.0)
        save(figure, path)


def plot_case(left: Axes, right: Axes, result: Mapping) -> None:
    rows = [row for row in result["rows"] if row["name"] != VANILLA]
    vanilla = next(row for row in result["rows"] if row["name"] == VANILLA)
    times = [spread(ratios(result, row)) if "seconds" in row else None for row in rows]
    peaks = [row["peak_bytes"] / vanilla["peak_bytes"] if row.get("peak_bytes") else None for row in rows]
    bars(left, rows, times)
    bars(right, rows, [peak and {"median": peak, "p20": peak, "p80": peak} for peak in peaks])
    left.set_title(f"{title(result)}\nTime of a step over the vanilla one's (line: p20 – p80)")
    right.set_title("\nPeak memory over the vanilla step's")
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.invert_yaxis()


def bars(axes: Axes, rows: Sequence[Mapping], values: Sequence[Mapping[str, float] | None]) -> None:
    """A bar per row with its number behind it; eager code in another colour, what is absent said in words."""
    ours, eager = LIGHT.series[:2]
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            write(axes, place, 0.0, row.get("absent", "not measured"), LIGHT.muted)
            continue
        colour = eager if row["name"].startswith("eager") else ours
        axes.barh(place, value["median"], height=0.66, color=colour, alpha=0.85)
        axes.plot([value["p20"], value["p80"]], [place, place], color=LIGHT.text, linewidth=1.2)
        write(axes, place, max(1.0, value["median"], value["p80"]), f"{value['median']:.3f}", LIGHT.text)
    axes.axvline(1.0, color=LIGHT.text, linewidth=1.0, linestyle="--")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


def write(axes: Axes, place: int, x: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, color=colour)
