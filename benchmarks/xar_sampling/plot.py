"""The figure, plotted from the JSON document alone: by which factor every run is faster than the published loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _plots import bar, label_rows, plot_panels
from cases import PUBLISHED
from haste.plotting import LIGHT
from matplotlib.axes import Axes
from report import speedups, title

from haste_ext.bench.measure import spread


def plot_cases(document: Mapping, path: Path) -> None:
    plot_panels(document["results"], path, plot_case, row=0.36)


def plot_case(axes: Axes, result: Mapping) -> None:
    """A bar per row."""
    rows = result["rows"]
    ours, published = LIGHT.series[:2]
    for place, row in enumerate(rows):
        found = spread(speedups(result, row, PUBLISHED))
        colour = published if row["name"] == PUBLISHED else ours
        bar(axes, place, found, colour, f"{found['median']:.2f}", found["p80"])
    label_rows(axes, [row["name"] for row in rows], margin=0.2)
    axes.set_title(f"{title(result)}\nTimes faster than the published loop (bar; line: p20 – p80)")
