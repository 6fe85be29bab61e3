"""The figure, plotted from the JSON document alone: by which factor every run is faster, in seconds and in FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from haste.plotting import LIGHT, save, styled
from matplotlib.axes import Axes
from report import flops_speedup, title, wall_speedups

from haste_ext.bench.measure import spread

ROW_INCHES = 0.32


def plot_cases(document: Mapping, path: Path) -> None:
    """One panel per case."""
    results = document["results"]
    heights = [1.1 + ROW_INCHES * len(result["rows"]) for result in results]
    with styled(LIGHT):
        figure, grid = plt.subplots(len(results), 1, squeeze=False, figsize=(8.0, sum(heights)), height_ratios=heights)
        for axes, result in zip(grid[:, 0], results, strict=True):
            plot_case(axes, result)
        figure.tight_layout(h_pad=2.0)
        save(figure, path)


def plot_case(axes: Axes, result: Mapping) -> None:
    """A bar per row for the seconds, a mark for the FLOPs; eager code in another colour."""
    rows = [row for row in result["rows"] if "seconds" in row]
    ours, eager = LIGHT.series[:2]
    for place, row in enumerate(rows):
        wall, flops = spread(wall_speedups(result, row)), flops_speedup(result, row)
        colour = eager if row["name"].startswith("eager") else ours
        axes.barh(place, wall["median"], height=0.66, color=colour, alpha=0.85)
        axes.plot([wall["p20"], wall["p80"]], [place, place], color=LIGHT.text, linewidth=1.2)
        axes.plot([flops, flops], [place - 0.4, place + 0.4], color=LIGHT.text, linewidth=2.0)
        axes.annotate(
            f"{wall['median']:.2f} of {flops:.2f}", (max(wall["p80"], flops), place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=LIGHT.text,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{title(result)}\nTimes faster than uncached: seconds (bar; line: p20 – p80), FLOPs (mark)")
