"""The plots of a run, from its JSON document alone: time, memory and share of the roofline over N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed, and none is looked for

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from haste_ext.bench.report import LABELS, revision, where

TEXT, MUTED, GRID = "#1b1f24", "#5f6873", "#e3e6ea"
# Okabe and Ito's colours, told apart by colour-blind readers; on grey paper the markers do it.
OURS, BASELINE, COPY = ("#0072b2", "o"), ("#d55e00", "s"), ("#68707b", "x")
BY_NAME = {"torch.compile": ("#009e73", "D"), "flash composition": ("#cc79a7", "v"), "a copy of the same bytes": COPY}
OTHER = ("#e69f00", "^")
SETTINGS = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.dpi": 160, "font.family": "DejaVu Sans",
    "font.size": 10, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.titlecolor": TEXT, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.edgecolor": GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "grid.color": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
}  # fmt: skip
LEAST_MIB = 0.01  # memory is plotted on a logarithmic scale, and some take none


def plot_document(document: Mapping, folder: Path, stem: str) -> list[Path]:
    """One figure per operation; returns their paths, `stem`.png where there is just one."""
    folder.mkdir(parents=True, exist_ok=True)
    operations = list(dict.fromkeys(result["operation"] for result in document["results"]))
    paths = []
    for operation in operations:
        results = [result for result in document["results"] if result["operation"] == operation]
        path = folder / (f"{stem}.png" if len(operations) == 1 else f"{stem}-{operation}.png")
        with plt.rc_context(SETTINGS):
            figure = plot_operation(results, document)
            figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
            plt.close(figure)
        paths.append(path)
    return paths


def plot_operation(results: Sequence[Mapping], document: Mapping) -> Figure:
    """A row of panels for every type."""
    dtypes = list(dict.fromkeys(result["case"]["dtype"] for result in results))
    has_roofline = document["roofline"] is not None
    columns = [plot_time, plot_memory, *([plot_share] if has_roofline else [])]
    size = (1.0 + 4.1 * len(columns), 0.6 + 3.2 * len(dtypes))
    figure, grid = plt.subplots(len(dtypes), len(columns), squeeze=False, figsize=size)
    figure.subplots_adjust(wspace=0.24, hspace=0.42)
    for row, dtype in zip(grid, dtypes, strict=True):
        own = sorted((r for r in results if r["case"]["dtype"] == dtype), key=lambda r: r["case"]["tokens"])
        for axes, panel in zip(row, columns, strict=True):
            panel(axes, own, dtype)
            tokens_axis(axes, [result["case"]["tokens"] for result in own])
    finish(figure, results, document)
    return figure


def plot_time(axes: Axes, results: Sequence[Mapping], dtype: str) -> None:
    axes.set_title(f"{dtype}: time (ms)")
    axes.set_yscale("log")
    for name, points in series(results):
        median, low, high = ([1e3 * row["seconds"][key] for _, row in points] for key in ("median", "p20", "p80"))
        tokens = [n for n, _ in points]
        axes.fill_between(tokens, low, high, color=style(name, results[0])["color"], alpha=0.15, linewidth=0)
        axes.plot(tokens, median, label=name, **style(name, results[0]))
    for result in results:
        label_speed(axes, result)
    plain_log_ticks(axes)


def label_speed(axes: Axes, result: Mapping) -> None:
    """Beside our point, how many times faster than the baseline."""
    rows = {row["name"]: row for row in result["rows"] if "seconds" in row}
    if result["ours"] not in rows or result["baseline"] not in rows:
        return
    ours, baseline = (rows[result[key]]["seconds"]["median"] for key in ("ours", "baseline"))
    axes.annotate(f"{baseline / ours:.1f}×", (result["case"]["tokens"], 1e3 * ours), xytext=(9, -11), ha="left",
                  textcoords="offset points", fontsize=9, fontweight="bold", color=OURS[0], zorder=4,
                  path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
    axes.margins(x=0.16, y=0.16)


def plot_memory(axes: Axes, results: Sequence[Mapping], dtype: str) -> None:
    axes.set_title(f"{dtype}: extra memory (MiB)")
    axes.set_yscale("log")
    for name, points in series(results, "peak_extra_bytes"):
        values = [max(row["peak_extra_bytes"] / 2**20, LEAST_MIB) for _, row in points]
        axes.plot([n for n, _ in points], values, label=name, **style(name, results[0]))
    axes.margins(x=0.16, y=0.12)
    plain_log_ticks(axes)


def plot_share(axes: Axes, results: Sequence[Mapping], dtype: str) -> None:
    axes.set_title(f"{dtype}: share of the roofline (%)")
    for name, points in series(results, "roofline_share"):
        values = [100 * row["roofline_share"] for _, row in points]
        axes.plot([n for n, _ in points], values, label=name, **style(name, results[0]))
    axes.axhline(100, color=MUTED, linewidth=1.0, linestyle=":")
    axes.margins(x=0.16)
    axes.set_ylim(0, None)


def series(results: Sequence[Mapping], key: str = "seconds") -> list[tuple[str, list[tuple[int, Mapping]]]]:
    """Per contender its (tokens, row) where it has that value; contenders without any are left out."""
    names = list(dict.fromkeys(row["name"] for result in results for row in result["rows"]))
    found = []
    for name in names:
        points = [
            (result["case"]["tokens"], row)
            for result in results
            for row in result["rows"]
            if row["name"] == name and row.get(key) is not None
        ]
        if points:
            found.append((name, points))
    return found


def style(name: str, result: Mapping) -> dict[str, Any]:
    ours = name == result["ours"]
    colour, marker = OURS if ours else BASELINE if name == result["baseline"] else BY_NAME.get(name, OTHER)
    return {
        "color": colour, "marker": marker, "markersize": 6, "linewidth": 2.6 if ours else 1.6,
        "linestyle": "--" if (colour, marker) == COPY else "-", "zorder": 3 if ours else 2,
    }  # fmt: skip


def tokens_axis(axes: Axes, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("tokens N")


def plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def finish(figure: Figure, results: Sequence[Mapping], document: Mapping) -> None:
    """Heading, where it was measured, one legend for all panels, and what is absent."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    bottom = min(axes.get_position().y0 for axes in figure.axes)
    left, top = figure.axes[0].get_position().x0, figure.axes[0].get_position().y1
    inch = 1 / figure.get_figheight()
    figure.legend(entries.values(), entries.keys(), loc="upper left", bbox_to_anchor=(left, bottom - 0.5 * inch),
                  ncols=len(entries), borderaxespad=0, borderpad=0, columnspacing=1.6)  # fmt: skip
    result, machine = results[0], document["machine"]
    figure.text(left, top + 0.70 * inch, f"{result['operation']}, {result['mode']}", fontsize=13, fontweight="bold")
    place = f"{where(machine)}; torch {machine['torch']}{revision(machine)}"
    figure.text(left, top + 0.32 * inch, f"{shape(results)}\n{place}", fontsize=9, color=MUTED, linespacing=1.4)
    notes = [
        "Medians; the band of a time spans its 20th to 80th percentile; "
        f"in blue, how many times as fast as {result['baseline']}.",
        f"Extra memory: the peak beyond inputs and results; {LEAST_MIB} stands for less.",
    ]
    figure.text(left, bottom - 0.82 * inch, "\n".join([*notes, *absences(results)]), fontsize=8, color=MUTED, va="top",
                linespacing=1.5)  # fmt: skip


def shape(results: Sequence[Mapping]) -> str:
    """The dimensions that the figure does not vary over."""
    parts = []
    for name in LABELS:
        values = list(dict.fromkeys(result["case"][name] for result in results if name in result["case"]))
        if values and name != "tokens":
            parts.append(f"{LABELS[name]} {', '.join(map(str, values))}")
    return ", ".join(parts)


def absences(results: Sequence[Mapping]) -> list[str]:
    """One line per contender and reason, with the cases that did not run."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for row in result["rows"]:
            if "absent" in row:
                case = f"{result['case']['dtype']} N {result['case']['tokens']}"
                cases.setdefault((row["name"], row["absent"]), []).append(case)
    return [f"No {name} for {', '.join(where)}: {why}" for (name, why), where in cases.items()]
