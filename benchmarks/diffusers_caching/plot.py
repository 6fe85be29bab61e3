"""The figure, plotted from the JSON document alone: each cache's error against its speed-up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from haste.plotting import LIGHT, save, styled
from matplotlib.axes import Axes
from report import flops_speedup, speedup

PANEL = (7.0, 4.6)
MARKS = {"module": "o", "block": "s", "model": "^", "output": "v"}


def plot_cases(document: Mapping[str, Any], path: Path) -> None:
    """One panel per case."""
    results = document["results"]
    with styled(LIGHT):
        width, height = PANEL
        columns = min(2, len(results))
        lines = -(-len(results) // columns)
        figure, grid = plt.subplots(lines, columns, squeeze=False, figsize=(width * columns, height * lines))
        for axes in grid.flat[len(results) :]:
            axes.set_visible(False)
        for axes, result in zip(grid.flat, results, strict=False):
            plot_case(axes, result)
        figure.tight_layout(h_pad=2.0)
        save(figure, path)


def plot_case(axes: Axes, result: Mapping[str, Any]) -> None:
    """A mark per row: ours in one colour, peers in another; a line from it to its speed-up in FLOPs."""
    ours, peer = LIGHT.series[:2]
    for row in result["rows"]:
        if not row.get("cpu_seconds") or not row["error"]:
            continue
        speed, flops = speedup(result, row), flops_speedup(result, row)
        colour = ours if row["ours"] else LIGHT.text if row["name"].startswith("uncached") else peer
        mark = next((mark for granularity, mark in MARKS.items() if row["ours"] and granularity in row["name"]), "D")
        axes.plot([speed, flops], [row["error"]] * 2, color=colour, linewidth=1.0, alpha=0.5)
        axes.plot(speed, row["error"], mark, color=colour, markersize=7)
        if not row["ours"]:
            axes.annotate(row["name"], (speed, row["error"]), xytext=(-8, -3), ha="right", textcoords="offset points",
                          fontsize=7.5, color=colour)  # fmt: skip
    for granularity, mark in MARKS.items():
        axes.plot([], [], mark, color=ours, label=f"haste, {granularity}")
    axes.legend(loc="upper left", fontsize=7.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.margins(x=0.12, y=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("Times faster than uncached, processor time (line: to FLOPs)")
    axes.set_ylabel("Relative error of the latents")
    axes.set_title(result["case"]["name"])
