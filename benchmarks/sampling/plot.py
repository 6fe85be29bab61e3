"""The figure, plotted from the JSON document alone: by which factor every run is faster, in seconds and in FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _plots import bar, label_rows, plot_panels
from haste.plotting import LIGHT
from matplotlib.axes import Axes
from report import flops_speedup, title, wall_speedups

from haste_ext.bench.measure import spread


def plot_cases(document: Mapping, path: Path) -> None:
    plot_panels(document["results"], path, plot_case, row=0.32)


def plot_case(axes: Axes, result: Mapping) -> None:
    """A bar per row for the seconds, a mark for the FLOPs; eager code in another colour."""
    rows = [row for row in result["rows"] if "seconds" in row]
    ours, eager = LIGHT.series[:2]
    for place, row in enumerate(rows):
        wall, flops = spread(wall_speedups(result, row)), flops_speedup(result, row)
        colour = eager if row["name"].startswith("eager") else ours
        bar(axes, place, wall, colour, f"{wall['median']:.2f} of {flops:.2f}", max(wall["p80"], flops))
        axes.plot([flops, flops], [place - 0.4, place + 0.4], color=LIGHT.text, linewidth=2.0)
    label_rows(axes, [row["name"] for row in rows], margin=0.25)
    axes.set_title(f"{title(result)}\nTimes faster than uncached: seconds (bar; line: p20 – p80), FLOPs (mark)")
