"""Plots: two themes, grids of samples, losses, scores over training, errors over sampling steps."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from haste.io import remove_abandoned, write_atomically

matplotlib.use("Agg")  # no screen is needed


@dataclass(frozen=True)
class Theme:
    """Colours of one theme; those of `series` differ also for colour-blind readers and in grey."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    error: str
    series: tuple[str, ...]


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#68707b", "#e3e6ea", "#c62828",
              ("#2563eb", "#d97706", "#0f766e", "#7c3aed", "#be185d", "#64748b"))  # fmt: skip
DARK = Theme("dark", "#15191f", "#e8eaed", "#9aa3ae", "#2b313a", "#ff8a80",
             ("#7aa7ff", "#f5b04c", "#4fd1c0", "#b79cff", "#ff8fc2", "#9fb0c3"))  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Use a theme for the plots inside this block."""
    settings = {
        "figure.facecolor": theme.background, "axes.facecolor": theme.background, "savefig.facecolor": theme.background,
        "text.color": theme.text, "axes.labelcolor": theme.text, "axes.titlecolor": theme.text,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "axes.edgecolor": theme.grid,
        "xtick.labelcolor": theme.muted, "ytick.labelcolor": theme.muted,
        "grid.color": theme.grid, "grid.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 2.0,
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.titlepad": 10, "legend.frameon": False, "legend.fontsize": 9,
        "text.parse_math": False,  # a $ in a run's name is a $
        "axes.prop_cycle": cycler(color=theme.series), "figure.dpi": 100, "savefig.dpi": 160,
    }  # fmt: skip
    with plt.rc_context(settings):
        yield


def _legible(text: object) -> str:
    """Text that matplotlib can set, with question marks for what UTF-8 cannot hold."""
    return str(text).encode("utf-8", "replace").decode()


def _thousands(axes: Axes) -> None:
    """Write the steps of the x axis as 2,000."""
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file, and close it. A letter that the font lacks is a box, without a warning."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Save as PNG, whole or not at all, and close the figure."""
    remove_abandoned(path)
    png = to_png(figure)
    write_atomically(path, lambda temporary: temporary.write_bytes(png))


GRID_INCHES = 13.0  # the largest width of a grid
GRID_TILE_INCHES = 0.5  # the smallest width of an image of a grid
LARGEST_TILE = 256  # the largest, in pixels
GAP_INCHES, LABEL_INCHES = 0.06, 0.2  # between images, and above each for its label
LETTERS_PER_INCH = 15  # of a label
CAPTION_TILE_INCHES = 1.5  # the smallest width of an image with a caption
CAPTION_LETTERS_PER_INCH, CAPTION_LINE_INCHES, CAPTION_LINES = 17, 0.13, 8  # of a caption below an image, at most
SMOOTHING_WINDOWS = 40  # a curve is smoothed over 1/40 of its length to each side

LOSSES = {
    "loss": "Diffusion loss (velocity or noise)",
    "proj_loss": "Feature loss (−cosine)",
    "attn_loss": "Attention loss (cross-entropy, nats)",
    "disp_loss": "Dispersive loss (log of the mean similarity)",
    "cls_loss": "Class token loss (velocity)",
    "sra_loss": "Self-alignment loss (smooth L1)",
}


def plot_grid(
    path: Path,
    images: np.ndarray,
    labels: Sequence[object],
    *,
    title: str,
    columns: int = 10,
    below: bool = False,
    theme: Theme = LIGHT,
) -> None:
    """Plot a grid of images (N, H, W, 3) uint8, each under its label, cut to the image's width; or with `below` each
    above it, wrapped to the image's width, as captions are long.

    Small images are enlarged without smoothing; those of more than LARGEST_TILE pixels are made smaller.
    """
    side = images.shape[1]
    with styled(theme):
        smallest = CAPTION_TILE_INCHES if below else GRID_TILE_INCHES
        tile = max(smallest, min(side, LARGEST_TILE) / plt.rcParams["savefig.dpi"])
        columns = min(columns, int(GRID_INCHES / tile), len(images) if below else columns)
        rows = math.ceil(len(images) / columns)
        cut = wrapped if below else shortened
        texts = [cut(_legible(label), tile) for label in labels]
        lines = 1 + max(text.count("\n") for text in texts)
        beside = GAP_INCHES / tile
        above = (lines * CAPTION_LINE_INCHES + 2 * GAP_INCHES if below else LABEL_INCHES) / tile
        size = (tile * (columns + (columns - 1) * beside), tile * (rows + (rows - 1) * above))
        whole = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": beside, "hspace": above}
        figure, grid = plt.subplots(rows, columns, squeeze=False, figsize=size, gridspec_kw=whole)
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, text in zip(grid.flat, images, texts, strict=False):
            axes.imshow(image, interpolation="nearest" if side <= LARGEST_TILE else "auto")
            if below:
                axes.text(0, -GAP_INCHES / tile, text, fontsize=7, color=theme.text, va="top", transform=axes.transAxes)
            else:
                axes.set_title(text, fontsize=8, color=theme.muted, fontweight="normal", loc="center", pad=2)
        heading(figure, title, gap=0.28)
        save(figure, path)


def shortened(text: str, inches: float) -> str:
    """A label as one line, cut off at a width."""
    return text[: int(inches * LETTERS_PER_INCH)]


def wrapped(text: str, inches: float) -> str:
    """A caption as lines of a width, at most CAPTION_LINES of them; the last then ends in dots."""
    width = int(inches * CAPTION_LETTERS_PER_INCH)
    return "\n".join(textwrap.wrap(text, width, max_lines=CAPTION_LINES, placeholder=" …"))


def plot_losses(
    path: Path, log: Sequence[Mapping], *, title: str, stop: int | None = None, theme: Theme = LIGHT
) -> None:
    """Plot the losses of one run, faint as logged and bold smoothed.

    Args:
        log: the lines of its log.jsonl. Losses that the run did not have are left out.
        stop: the step at which alignment ended, to be marked.
    """
    present = [name for name in LOSSES if any(record.get(name) is not None for record in log)]
    with styled(theme):
        figure, panels = plt.subplots(1, len(present), squeeze=False, figsize=(1.2 + 3.7 * len(present), 3.0))
        for axes, name, colour in zip(panels.flat, present, theme.series, strict=False):
            points = [(record["step"], record[name]) for record in log if record.get(name) is not None]
            steps, values = np.array(points, dtype=np.float64).T
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0)
            axes.plot(steps, smooth(values), color=colour)
            axes.set(title=LOSSES[name], xlabel="Training step", xlim=(0, max(record["step"] for record in log)))
            axes.set_ylim(*robust_limits(values))
            _thousands(axes)
            if stop is not None:
                _mark_step(axes, stop, "alignment ends", theme)
        heading(figure, title)
        figure.subplots_adjust(wspace=0.28)
        save(figure, path)


Scores = Mapping[str, Mapping[int, Sequence[Mapping]]]
"""Records with step, fd and label_accuracy in the order of the steps, by method and seed."""


def plot_scores(path: Path, scores: Scores, *, title: str, stop: int | None = None, theme: Theme = LIGHT) -> None:
    """Plot FD (log scale) and label accuracy over training steps: one line per method, its mean over seeds.

    With several seeds a band spans the lowest to the highest.
    """
    with _score_panels(path, title, stop, theme) as (left, right):
        for place, (method, seeds) in enumerate(scores.items()):
            steps = _steps_of(seeds)
            _plot_series(left, place, method, steps, _values_of(seeds, "fd"), theme)
            _plot_series(right, place, method, steps, 100.0 * _values_of(seeds, "label_accuracy"), theme)
        _set_fd(left)
        right.set(title="Label accuracy (%)")


def plot_rates(
    path: Path,
    records: Sequence[Mapping],
    rates: Mapping[str, str],
    *,
    title: str,
    stop: int | None = None,
    theme: Theme = LIGHT,
) -> None:
    """Plot FD (log scale) and what samples show of their prompts over training steps.

    Args:
        records: with step, fd and read, the rates from 0 to 1 by name; None where no prompt asks for it.
        rates: their titles; those of the second half are dashed, in the colours of the first.
    """
    with _score_panels(path, title, stop, theme) as (left, right):
        steps = [record["step"] for record in records]
        left.plot(steps, [record["fd"] for record in records], marker="o", markersize=4.5)
        _set_fd(left)
        half = math.ceil(len(rates) / 2)
        for place, (key, name) in enumerate(rates.items()):
            values = np.array([record["read"].get(key) for record in records], dtype=np.float64)
            right.plot(steps, 100.0 * values, "-" if place < half else "--", marker="o", markersize=3.5,
                       color=theme.series[place % half % len(theme.series)], label=name)  # fmt: skip
        right.set(title="Read as asked for (%)")
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)  # dashes are seen


def plot_advantage(
    path: Path, scores: Scores, baseline: str, *, title: str, stop: int | None = None, theme: Theme = LIGHT
) -> None:
    """Plot the scores relative to those of one method at the same step and seed, which shows small differences.

    Only seeds that the baseline has are shown. Bands as in plot_scores.
    """
    with _score_panels(path, title, stop, theme) as (left, right):
        for place, (method, seeds) in enumerate(scores.items()):
            shared = [seed for seed in seeds if seed in scores[baseline]]
            own, other = ({seed: side[seed] for seed in shared} for side in (seeds, scores[baseline]))
            ratio = 100.0 * (_values_of(own, "fd") / _values_of(other, "fd") - 1.0)
            gain = 100.0 * (_values_of(own, "label_accuracy") - _values_of(other, "label_accuracy"))
            _plot_series(left, place, method, _steps_of(own), ratio, theme)
            _plot_series(right, place, method, _steps_of(own), gain, theme)
        left.set(title=f"FD relative to {baseline}, same seed (%)")
        right.set(title=f"Label accuracy relative to {baseline} (points)")


@contextmanager
def _score_panels(path: Path, title: str, stop: int | None, theme: Theme) -> Iterator[tuple[Axes, Axes]]:
    """Yield two panels over training steps; then set the axes of steps, the end of alignment, a legend, the heading."""
    with styled(theme):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12.0, 3.8))
        yield left, right
        for axes, height in ((left, 0.94), (right, 0.03)):  # away from the curves
            _thousands(axes)
            axes.set(xlabel="Training step", xlim=(0, None))
            if stop is not None:
                _mark_step(axes, stop, "alignment ends", theme, height)
        handles, names = left.get_legend_handles_labels()
        if len(handles) > 1:
            figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(names))
        heading(figure, title)
        figure.subplots_adjust(wspace=0.2)
        save(figure, path)


def plot_step_errors(
    path: Path, errors: np.ndarray, *, title: str, full_steps: Sequence[int] = (), theme: Theme = LIGHT
) -> None:
    """Plot the relative error of a cached run's state after every step: the mean, and lowest to highest.

    Args:
        errors: (steps, images). Zeros, where the states still agree, are left out.
        full_steps: counted from 0, to be marked with a dot.
    """
    steps = np.arange(1, len(errors) + 1)
    positive = np.where(errors > 0, errors, np.nan)
    mean = np.where(errors.mean(axis=1) > 0, errors.mean(axis=1), np.nan)
    with styled(theme):
        figure, axes = plt.subplots(figsize=(9.6, 3.4))
        axes.plot(steps, mean, color=theme.series[0], label="mean")
        lowest, highest = np.fmin.reduce(positive, axis=1), np.fmax.reduce(positive, axis=1)
        axes.fill_between(steps, lowest, highest, color=theme.series[0], alpha=0.13, linewidth=0,
                          label="lowest to highest image")  # fmt: skip
        full = np.array(full_steps, dtype=int)
        if len(full):
            axes.plot(full + 1, mean[full], "o", color=theme.series[1], markersize=4.5, label="full step")
        axes.set(xlabel="Sampling step", xlim=(0, 1.01 * len(errors)), yscale="log" if (errors > 0).any() else "linear")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if (errors > 0).any():  # rounding, far below the forecasts' errors, would flatten them
            axes.set_ylim(bottom=max(np.nanmin(positive), np.nanmax(positive) / 1e3) / 1.3)
        axes.set(title="‖x cached − x full‖ / ‖x full‖ after each step")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.legend(loc="lower right")
        heading(figure, title)
        save(figure, path)


def _set_fd(axes: Axes) -> None:
    """The title and the logarithmic axis of a panel of FDs."""
    axes.set(title="FD to real images (lower is better)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _steps_of(seeds: Mapping[int, Sequence[Mapping]]) -> list[int]:
    """The steps of a method."""
    return [record["step"] for record in next(iter(seeds.values()))]


def _values_of(seeds: Mapping[int, Sequence[Mapping]], key: str) -> np.ndarray:
    """One score of a method, (seeds, steps)."""
    return np.array([[record[key] for record in records] for records in seeds.values()])


def _plot_series(axes: Axes, place: int, method: str, steps: Sequence[int], values: np.ndarray, theme: Theme) -> None:
    """Plot a method's values (seeds, steps): their mean and, with several seeds, the band from lowest to highest.

    From the fourth method on lines are dashed: methods that agree for a while would hide each other.
    """
    colour, line = theme.series[place % len(theme.series)], "-" if place < 3 else "--"
    axes.plot(steps, values.mean(axis=0), line, color=colour, marker="o", markersize=4.5, label=_legible(method))
    if len(values) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0)


def smooth(values: np.ndarray, windows: int = SMOOTHING_WINDOWS) -> np.ndarray:
    """The running mean (N,), over 1/windows of the curve to each side, shorter at its ends."""
    half = max(len(values) // windows, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def robust_limits(values: np.ndarray) -> tuple[float, float]:
    """The limits of a y axis, without a few extreme early values."""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _mark_step(axes: Axes, step: int, text: str, theme: Theme, height: float = 0.94) -> None:
    """Mark a training step by a dashed line, with a text at this share of the height."""
    axes.axvline(step, color=theme.muted, linestyle="--", linewidth=1.0)
    axes.annotate(text, (step, height), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                  fontsize=8, color=theme.muted)  # fmt: skip


def heading(figure: plt.Figure, title: str, gap: float = 0.42) -> None:
    """Write the title of a figure, left-aligned, `gap` inches above the panels."""
    top = max(axes.get_position().y1 for axes in figure.axes)
    offset = gap / figure.get_figheight()
    left = min(axes.get_position().x0 for axes in figure.axes)
    figure.text(left, top + offset, _legible(title), fontsize=12, fontweight="bold", va="bottom", ha="left")
