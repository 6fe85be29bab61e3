"""Pages of one HTML file each, made of the templates beside this module, and the plots on them.

A page fetches nothing: images are data URIs. Plots are small enough that a telephone shows their text in a size to
read. Titles and legends are text of the page, so that no name of a run reaches matplotlib.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

from haste.io import write_text
from haste.plotting import THEMES, Theme, robust_limits, smooth, styled, to_png
from haste.tables import format_number

TEMPLATES = Path(__file__).parent / "templates"


# ---- pages ----


@cache
def templates() -> jinja2.Environment:
    """The templates, with every value escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["themes"] = THEMES
    environment.filters |= {
        "data_uri": data_uri,
        "number": format,
        "number_text": number_text,
        "numeric_columns": numeric_columns,
        "png": png,
    }
    return environment


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page and write it, whole or not at all.

    What UTF-8 cannot hold, such as the odd bytes of a file's name, becomes a question mark.
    """
    html = templates().get_template(template).render(values)
    write_text(path, html.encode("utf-8", "replace").decode() + "\n")


def is_page(path: Path) -> bool:
    """Whether a file is one of these pages, by how it begins."""
    head = (TEMPLATES / "head.html").read_bytes().rstrip()
    try:
        with open(path, "rb") as file:
            return file.read(len(head)) == head
    except OSError:
        return False


def data_uri(png: bytes) -> str:
    """A PNG file's bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def number_text(value: float | None, digits: int) -> str:
    """A number of a log, which may be of any size, or a dash."""
    return f"{value:.3e}" if value is not None and abs(value) >= 1e9 else format_number(value, digits)


def numeric_columns(rows: Sequence[Sequence[object]]) -> list[int]:
    """The columns of a table whose cells are all numbers."""
    return [index for index, cells in enumerate(zip(*rows, strict=True)) if all(is_number(str(c)) for c in cells)]


def is_number(text: str) -> bool:
    """Whether a cell begins with a number, such as 1,797 or 2.19× or 6 of 20."""
    try:
        float(text.split(" ")[0].replace(",", "").rstrip("%×s"))
    except ValueError:
        return False
    return True


# ---- plots ----

SIZE = (4.4, 2.9)  # inches; a page shows 75 to 115 pixels of them per inch
FONT_POINTS = 12
COMPARED_WINDOWS = 20  # curves of several runs are smoothed over a tenth of their length
LINES = ("-", "--", ":")  # from the first run on that has a colour for the second time

Points = Sequence[tuple[int, float]]
"""(step, value)"""


@dataclass(frozen=True)
class Curve:
    """Values of one run.

    Args:
        run: its number among all, from 0, which gives the colour.
        faint: (N,), plotted behind `values`, such as values as logged behind smoothed ones.
    """

    run: int
    steps: np.ndarray
    values: np.ndarray
    faint: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """A plot of one quantity over training steps.

    Args:
        last_step: the end of the axis.
        points: mark every value, for few of them.
        log: a logarithmic axis of values.
        zero: a line at 0, for differences.
        stops: (run, step) where the alignment of a run ended.
        bounds: the lowest and the highest possible value.
    """

    title: str
    curves: Sequence[Curve]
    last_step: int
    points: bool = False
    log: bool = False
    zero: bool = False
    stops: Sequence[tuple[int, int]] = ()
    bounds: tuple[float, float] = (-np.inf, np.inf)

    def png(self, theme: Theme) -> bytes:
        """The plot, without its title, as a PNG file."""
        with styled(theme), plt.rc_context({"font.size": FONT_POINTS}):
            figure, axes = plt.subplots(figsize=SIZE)
            if self.zero:
                axes.axhline(0.0, color=theme.muted, linewidth=1.0)
            for curve in self.curves:
                style = line_style(curve.run, theme)
                if curve.faint is not None:
                    axes.plot(curve.steps, curve.faint, color=style["color"], alpha=0.25, linewidth=1.0)
                marker = "o" if self.points or len(curve.steps) == 1 else None
                axes.plot(curve.steps, curve.values, **style, marker=marker, clip_on=marker is None)
            for run, step in self.stops:
                axes.axvline(step, color=line_style(run, theme)["color"], linestyle=":", linewidth=1.2)
            axes.set(xlabel="Training step", xlim=(0, max(self.last_step, 1)))
            self._scale(axes)
            return to_png(figure)

    def _scale(self, axes: plt.Axes) -> None:
        """Set limits that early extremes do not flatten, and few ticks, written out."""
        values = np.concatenate([curve.values if curve.faint is None else curve.faint for curve in self.curves])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if self.log and values.min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            low, high = (values.min(), values.max()) if self.points else robust_limits(values)
            margin = 0.06 * (high - low) or 0.1 * max(1.0, abs(high))
            axes.set_ylim(max(low - margin, self.bounds[0]), min(high + margin, self.bounds[1]))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def exact_curve(run: int, points: Points) -> Curve:
    """A curve of values as they are."""
    steps, values = np.array(points, dtype=np.float64).T
    return Curve(run, steps, values)


def smooth_curve(run: int, points: Points, alone: bool) -> Curve:
    """A smoothed curve: with the values as logged behind it if `alone`, else smoother, to be compared with others."""
    steps, values = np.array(points, dtype=np.float64).T
    return Curve(run, steps, smooth(values), values) if alone else Curve(run, steps, smooth(values, COMPARED_WINDOWS))


def difference(run: int, points: Points, base: Points) -> Curve | None:
    """A run's values minus those of the first run, where both were logged, smoothed; None if they share no steps.

    Runs of one seed see the same noise and times, so that most of the scatter cancels before it is smoothed.
    """
    steps, values = np.array(points, dtype=np.float64).T
    base_steps, base_values = np.array(base, dtype=np.float64).T
    shared = (steps >= base_steps[0]) & (steps <= base_steps[-1])
    if shared.sum() < 2:
        return None
    steps, values = steps[shared], values[shared]
    return Curve(run, steps, smooth(values - np.interp(steps, base_steps, base_values), COMPARED_WINDOWS))


def line_style(run: int, theme: Theme) -> dict[str, str]:
    """Colour and line of a run; the legend of parts.html has the same."""
    colours = theme.series
    return {"color": colours[run % len(colours)], "linestyle": LINES[run // len(colours) % len(LINES)]}
