"""The figure, plotted from the JSON document alone: by which factor every run is faster than the published loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from cases import PUBLISHED
from haste.plotting import LIGHT, save, styled
from matplotlib.axes import Axes
from report import speedups, title

from haste_ext.bench.measure import spread

ROW_INCHES = 0.36


def plot_cases(document: Mapping, path: Path) -> None:
    """One panel per case."""
    results = document["results"]
    heights = [1.0 + ROW_INCHES * len(result["rows"]) for result in results]
    with styled(LIGHT):
        figure, grid = plt.subplots(len(results), 1, squeeze=False, figsize=(8.0, sum(heights)), height_ratios=heights)
        for axes, result in zip(grid[:, 0], results, strict=True):
            plot_case(axes, result)
        figure.tight_layout(h_pad=2.0)
        save(figure, path)


def plot_case(axes: Axes, result: Mapping) -> None:
    """A bar per row."""
    rows = result["rows"]
    ours, published = LIGHT.series[:2]
    for place, row in enumerate(rows):
        found = spread(speedups(result, row, PUBLISHED))
        axes.barh(
            place, found["median"], height=0.66, color=published if row["name"] == PUBLISHED else ours, alpha=0.85
        )
        axes.plot([found["p20"], found["p80"]], [place, place], color=LIGHT.text, linewidth=1.2)
        axes.annotate(
            f"{found['median']:.2f}", (found["p80"], place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=LIGHT.text,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{title(result)}\nTimes faster than the published loop (bar; line: p20 – p80)")
