"""One look for all pictures: two themes, the colours of the methods, and how a figure is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed, and none is looked for

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from haste.io import remove_abandoned, write_atomically


@dataclass(frozen=True)
class Theme:
    """Colours of one theme; `series` are told apart by colour-blind readers and on grey paper."""

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
    """Draw inside this block in the given theme."""
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


def legible(text: object) -> str:
    """Text that matplotlib can set: of file names with odd bytes, question marks."""
    return str(text).encode("utf-8", "replace").decode()


def thousands(axes: Axes) -> None:
    """Write the steps of the x axis as 2,000."""
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))


def save(figure: Figure, path: Path) -> None:
    """Save as PNG, whole or not at all, and close the figure. A letter that the font lacks is a box, without a word."""
    remove_abandoned(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write_atomically(
            path, lambda temporary: figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)
        )
    plt.close(figure)
