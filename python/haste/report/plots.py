"""The figures of a report: panels small enough that a telephone shows their text in a size to read.

Titles and legends are text of the page, not of the figures. So nothing that a user has named reaches matplotlib.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from haste.evaluation.pictures import robust_limits, smooth
from haste.evaluation.style import DARK, LIGHT, Theme, save, styled
from haste.report.page import panel, themed_figure

SIZE = (4.4, 2.9)  # inches; a page shows 75 to 115 pixels of them per inch
FONT_POINTS = 12
COMPARED_WINDOWS = 20  # curves of several runs are smoothed over a tenth of their length
LINES = ("-", "--", ":")  # when the theme has no more colours


@dataclass(frozen=True)
class Curve:
    """place: of its run among all, which gives the colour. faint: (N,), shown behind, such as values as logged."""

    place: int
    steps: np.ndarray
    values: np.ndarray
    faint: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One quantity over training steps.

    points: mark every value, for few of them. log: logarithmic values. zero: a line at 0, for differences.
    stops: (place, step) where a run's alignment ended.
    """

    title: str
    curves: Sequence[Curve]
    points: bool = False
    log: bool = False
    zero: bool = False
    stops: Sequence[tuple[int, int]] = ()


def exact_curve(place: int, points: Sequence[tuple[int, float]]) -> Curve:
    """A curve of (step, value) as they are."""
    steps, values = np.array(points, dtype=np.float64).T
    return Curve(place, steps, values)


def smooth_curve(place: int, points: Sequence[tuple[int, float]], alone: bool) -> Curve:
    """A curve of (step, value), smoothed. alone: the values as logged behind it; else, beside other runs, smoother."""
    steps, values = np.array(points, dtype=np.float64).T
    return (
        Curve(place, steps, smooth(values), values) if alone else Curve(place, steps, smooth(values, COMPARED_WINDOWS))
    )


def difference(place: int, points: Sequence[tuple[int, float]], base: Sequence[tuple[int, float]]) -> Curve | None:
    """A run's values minus those of the first run, where both were logged, smoothed; None if they share no steps.

    Runs of one seed see the same noise and times, so that most of the scatter falls out before it is smoothed.
    """
    steps, values = np.array(points, dtype=np.float64).T
    base_steps, base_values = np.array(base, dtype=np.float64).T
    shared = (steps >= base_steps[0]) & (steps <= base_steps[-1])
    if shared.sum() < 2:
        return None
    steps, values = steps[shared], values[shared]
    return Curve(place, steps, smooth(values - np.interp(steps, base_steps, base_values), COMPARED_WINDOWS))


def panels_html(panels: Sequence[Panel], last_step: int) -> str:
    """Every panel in light and in dark below its title, as many beside each other as there is room for."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shown in enumerate(panels):
            paths = {theme.name: Path(folder) / f"{number}-{theme.name}.png" for theme in (LIGHT, DARK)}
            for theme in (LIGHT, DARK):
                plot(paths[theme.name], shown, last_step, theme)
            alt = f"{shown.title} over training steps"
            parts.append(panel(shown.title, themed_figure(paths["light"], paths["dark"], alt)))
    return f'<div class="panels">{"".join(parts)}</div>'


def plot(path: Path, shown: Panel, last_step: int, theme: Theme) -> None:
    """One panel as a PNG file."""
    with styled(theme), plt.rc_context({"font.size": FONT_POINTS}):
        figure, axes = plt.subplots(figsize=SIZE)
        if shown.zero:
            axes.axhline(0.0, color=theme.muted, linewidth=1.0)
        for one in shown.curves:
            look = look_of(one.place, theme)
            if one.faint is not None:
                axes.plot(one.steps, one.faint, color=look["color"], alpha=0.25, linewidth=1.0)
            axes.plot(one.steps, one.values, **look, marker="o" if shown.points or len(one.steps) == 1 else None)
        for place, step in shown.stops:
            axes.axvline(step, color=look_of(place, theme)["color"], linestyle=":", linewidth=1.2)
        axes.set_xlabel("Training step")
        axes.set_xlim(0, max(last_step, 1))
        scale(axes, shown)
        save(figure, path)


def scale(axes: plt.Axes, shown: Panel) -> None:
    """Limits that early extremes do not flatten, and few ticks, written out."""
    values = np.concatenate([one.values if one.faint is None else one.faint for one in shown.curves])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if shown.log and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = (values.min(), values.max()) if shown.points else robust_limits(values)
        margin = 0.06 * (high - low) or 0.1 * max(1.0, abs(high))
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def look_of(place: int, theme: Theme) -> dict[str, str]:
    """Colour and line of a run; the page's legend has the same."""
    colours = theme.series
    return {"color": colours[place % len(colours)], "linestyle": LINES[place // len(colours) % len(LINES)]}
