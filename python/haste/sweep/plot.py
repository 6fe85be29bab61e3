"""The plot of a sweep: FD and fidelity against seconds, FLOPs and memory, beside the line of uncached runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from haste.plotting import LIGHT, Theme, heading, save, styled
from haste.sweep.config import series_name, short_name
from haste.sweep.records import Row

MARKERS = {"module": "o", "block": "s", "model": "^", "output": "v"}
FORECASTERS = ("taylor", "newton", "hermite", "reuse", "delta-dit")  # in the order of the theme's colours
LOG_FROM = 4.0  # an axis whose values span this factor is logarithmic
LABEL_POINTS = 7.0
RING_POINTS = 12.0
REACHES = (4.5, 9.0, 15.0)  # possible distances of a label from its marker, in points
SIDES = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Measure:
    """An axis: its value of a row, and its title."""

    value: Callable[[Row], float | None]
    title: str


SECONDS = Measure(lambda row: 1e3 * row.seconds, "Milliseconds per image")
FLOPS = Measure(lambda row: row.flops / 1e9, "GFLOPs per image")
MEMORY = Measure(lambda row: row.peak_bytes / 2**20 if row.peak_bytes else None, "Peak memory of a batch, MiB")
COSTS = (SECONDS, FLOPS, MEMORY)
FD = Measure(lambda row: row.fd, "FD (lower is better)")
FIDELITY = Measure(lambda row: row.psnr, "PSNR with the full run, dB (higher is better)")


def plot_sweep(path: Path, rows: Sequence[Row], *, title: str, chosen: Row | None = None, theme: Theme = LIGHT) -> None:
    """Plot one column of panels per known cost, and one row of panels per known quality.

    Args:
        chosen: the recommended row, which gets a ring.
    """
    costs = [cost for cost in COSTS if all(cost.value(row) for row in rows)]
    qualities = [quality for quality in (FD, FIDELITY) if any(quality.value(row) for row in rows)]
    with styled(theme):
        size = (1.0 + 5.6 * len(costs), 0.8 + 4.4 * len(qualities))
        figure, grid = plt.subplots(
            len(qualities), len(costs), squeeze=False, figsize=size, sharex="col", sharey="row",
            gridspec_kw={"wspace": 0.06, "hspace": 0.1},
        )  # fmt: skip
        for panels, quality in zip(grid, qualities, strict=True):
            for axes, cost in zip(panels, costs, strict=True):
                plot_panel(axes, rows, cost, quality, theme)
                if chosen is not None:
                    axes.plot(*positions([chosen], cost, quality), "o", color=theme.text, markersize=RING_POINTS,
                              fillstyle="none", markeredgewidth=1.2, label="Recommended", zorder=4)  # fmt: skip
            panels[0].set_ylabel(quality.title)
        for axes, cost in zip(grid[-1], costs, strict=True):
            axes.set_xlabel(cost.title)
        handles, names = grid[0, 0].get_legend_handles_labels()
        columns = min(len(names), 6)
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.045), ncols=columns)
        heading(figure, title, gap=0.42)
        subtitle(figure, "Numbers: interval/order; along the line the steps of uncached sampling. "
                         "On the left of the line caching is worth it.", theme)  # fmt: skip
        figure.canvas.draw()  # places are known from here on
        for panels, quality in zip(grid, qualities, strict=True):
            for axes, cost in zip(panels, costs, strict=True):
                write_labels(axes, rows, cost, quality, theme, chosen)
        save(figure, path)


def plot_panel(axes: Axes, rows: Sequence[Row], cost: Measure, quality: Measure, theme: Theme) -> None:
    """Plot the line of the uncached runs, then each series of cached points in its colour and marker."""
    x, y = positions([row for row in rows if row.uncached], cost, quality)
    line = "none" if cost is MEMORY else "-"  # memory does not follow from the number of steps
    axes.plot(x, y, color=theme.text, linestyle=line, linewidth=1.6, marker="D", markersize=4.5,
              label="Uncached, fewer steps", zorder=2)  # fmt: skip
    for name in dict.fromkeys(series_name(row.settings) for row in rows if not row.uncached):
        own = [row for row in rows if series_name(row.settings) == name]
        colour, marker = look(own[0], theme)
        x, y = positions(own, cost, quality)
        axes.plot(x, y, marker, color=colour, markersize=6, markeredgecolor=theme.background, markeredgewidth=0.6,
                  label=name, zorder=3)  # fmt: skip
    scale_axes(axes, rows, cost, quality)


def positions(rows: Sequence[Row], cost: Measure, quality: Measure) -> tuple[list[float], list[float]]:
    """x and y of the points of known quality."""
    known = [(cost.value(row) or 0.0, y) for row in rows if (y := quality.value(row)) is not None]
    return [x for x, _ in known], [y for _, y in known]


def look(row: Row, theme: Theme) -> tuple[str, str]:
    """Colour by forecaster, marker by granularity."""
    settings = row.settings
    marker = "D" if settings.cache == "delta-dit" else MARKERS[settings.granularity]
    return theme.series[FORECASTERS.index(settings.cache) % len(theme.series)], marker


def scale_axes(axes: Axes, rows: Sequence[Row], cost: Measure, quality: Measure) -> None:
    """Make the axis of cost logarithmic, and that of FD if it spans a factor of LOG_FROM."""
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    _, values = positions(rows, cost, quality)
    if quality is FD and max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    axes.margins(x=0.08, y=0.08)


def plain_numbers(axis: Axis) -> None:
    """Write ticks as 1, 1.5, 2, 3, 5, 7, 10, ..."""
    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def write_labels(
    axes: Axes, rows: Sequence[Row], cost: Measure, quality: Measure, theme: Theme, chosen: Row | None = None
) -> None:
    """Write the short name of each point where it hides no marker, label or line; leave it out where it would.

    The uncached runs come first, then the points from the cheapest on.
    """
    shown = [row for row in rows if quality.value(row) is not None]
    shown.sort(key=lambda row: (not row.uncached, cost.value(row)))
    points = list(zip(*positions(shown, cost, quality), strict=True))
    sizes = [RING_POINTS if row is chosen else 7.0 for row in shown]
    taken = [square(place[0], place[1], size * axes.figure.dpi / 72)
             for place, size in zip(axes.transData.transform(points), sizes, strict=True)]  # fmt: skip
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    taken += [square(place[0], place[1], 1.0) for line in lines for place in along(axes, line)]
    inside = axes.get_window_extent()
    for row, point, size in zip(shown, points, sizes, strict=True):
        colour = theme.text if row.uncached else look(row, theme)[0]
        for reach, (dx, dy) in product(REACHES, SIDES):
            offset = reach + (size - 7.0) / 2
            text = axes.annotate(
                short_name(row.settings), point, xytext=(dx * offset, dy * offset), textcoords="offset points",
                ha=("left", "center", "right")[1 - dx], va=("bottom", "center", "top")[1 - dy],
                fontsize=LABEL_POINTS, color=colour, zorder=4,
            )  # fmt: skip
            box = text.get_window_extent()
            if inside.containsx(box.x0) and inside.containsx(box.x1) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def along(axes: Axes, line: Line2D) -> np.ndarray:
    """Close points on a line, (n, 2), in pixels."""
    corners = axes.transData.transform(line.get_xydata())
    return np.concatenate([corners, *(np.linspace(a, b, 100) for a, b in pairwise(corners))])


def square(x: float, y: float, side: float) -> Bbox:
    return Bbox.from_bounds(x - side / 2, y - side / 2, side, side)


def subtitle(figure: plt.Figure, text: str, theme: Theme) -> None:
    """Write a line between the title and the panels."""
    box = figure.axes[0].get_position()
    offset = 0.14 / figure.get_figheight()
    figure.text(box.x0, box.y1 + offset, text, fontsize=9, color=theme.muted, va="bottom", ha="left")
