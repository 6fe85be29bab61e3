"""What the figures of several benchmarks share: a panel per case, a horizontal bar per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from haste.plotting import LIGHT, save, styled
from matplotlib.axes import Axes


def plot_panels(results: Sequence[Mapping], path: Path, plot_case: Callable[[Axes, Mapping], None], row: float) -> None:
    """One panel per case, below each other; row: inches that a row of a case takes."""
    heights = [1.1 + row * len(result["rows"]) for result in results]
    with styled(LIGHT):
        figure, grid = plt.subplots(len(results), 1, squeeze=False, figsize=(8.0, sum(heights)), height_ratios=heights)
        for axes, result in zip(grid[:, 0], results, strict=True):
            plot_case(axes, result)
        figure.tight_layout(h_pad=2.0)
        save(figure, path)


def bar(axes: Axes, place: int, found: Mapping[str, float], colour: str, text: str, end: float) -> None:
    """The median of a row, a line from its 20th to its 80th percentile, and a text behind `end`."""
    axes.barh(place, found["median"], height=0.66, color=colour, alpha=0.85)
    axes.plot([found["p20"], found["p80"]], [place, place], color=LIGHT.text, linewidth=1.2)
    axes.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5,
                  color=LIGHT.text)  # fmt: skip


def label_rows(axes: Axes, names: Sequence[str], margin: float) -> None:
    """The names of the rows, from the top down, and room for texts behind the bars."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=margin)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
