"""The style sheet of the reports. Colours follow the reader's light or dark setting; nothing comes from elsewhere.

The parts of a report page: each function returns HTML, `render_page` puts them together into one file.

Images go in as data URIs, so that the file can be sent by mail and opened without a network.

The figures of a report: panels small enough that a telephone shows their text in a size to read.

Titles and legends are text of the page, not of the figures. So nothing that a user has named reaches matplotlib.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from haste.io import write_text
from haste.plotting import DARK, LIGHT, Theme, robust_limits, save, smooth, styled

SERIES = len(LIGHT.series)  # colours of runs


def _series(theme: Theme) -> str:
    return " ".join(f"--series-{place}: {colour};" for place, colour in enumerate(theme.series))


STYLE_SHEET = (
    f":root {{ {_series(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_series(DARK)} }} }}"
    + """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --text: #1b1f24; --muted: #5f6873;
  --line: #e1e4e8; --wrong: #c62828; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1014; --card: #15191f; --text: #e8eaed; --muted: #9aa3ae;
    --line: #2b313a; --wrong: #ff8a80; --code: #1d232b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; letter-spacing: -.01em; }
p { margin: 0 0 1rem; max-width: 75ch; }
.lead { color: var(--muted); font-size: 1.05rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.5rem; margin-top: 1.25rem;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .75rem; margin-top: 1.5rem;
}
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.25rem; }
.fact b {
  display: block; font-size: 1.6rem; line-height: 1.25; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
}
.fact span { color: var(--muted); font-size: .875rem; }
figure { margin: 0 0 1rem; }
figure:last-child, p:last-child, pre:last-child { margin-bottom: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: .875rem; margin-top: .5rem; max-width: 85ch; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.25rem 1rem; }
.panels:not(:last-child) { margin-bottom: 1.25rem; }
.panel { min-width: 0; }
.panel figure { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; max-width: none; }
.legend i { display: inline-block; width: 1.75rem; margin-right: .5rem; vertical-align: middle; }
.legend span { overflow-wrap: anywhere; }
table.images td { border: 0; padding: 0 .75rem .75rem 0; min-width: 200px; }
table.images th { border: 0; padding-bottom: .25rem; }
table.images th.row { color: var(--text); padding-top: .25rem; }
table.images img { display: block; width: 100%; max-width: 360px; height: auto; }
.tiles {
  display: grid; grid-template-columns: repeat(10, minmax(0, 56px)); gap: .5rem; align-items: end; margin-bottom: 1rem;
}
.tile { margin: 0; }
.tile img { display: block; width: 100%; aspect-ratio: 1; margin: 0 0 3px; image-rendering: pixelated; }
.tile figcaption {
  margin: 0; text-align: center; font-size: .8rem; line-height: 1.4; word-spacing: -.15em; overflow-wrap: anywhere;
}
.tile.wrong figcaption { color: var(--wrong); font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
.scroll:last-child { margin-bottom: 0; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; padding-right: 1.5rem; }
pre {
  background: var(--code); border-radius: 8px; padding: 1rem; font-size: .85rem; line-height: 1.6;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: bold; letter-spacing: -.01em; }
details[open] summary { margin-bottom: .75rem; }
@media (min-width: 1060px) {
  .tiles { grid-template-columns: repeat(20, 40px); }
}
@media (max-width: 600px) {
  .tiles { grid-template-columns: repeat(10, minmax(0, 32px)); gap: 4px 1px; }
  .tile figcaption { font-size: .7rem; }
  body { padding: 1.25rem .75rem 2rem; }
  section { padding: 1rem; }
  h1 { font-size: 1.6rem; }
}
"""
)


# How every page begins, by which it is known again.
HEAD = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="haste">'


def render_page(title: str, lead: str, *parts: str) -> str:
    """A whole HTML document: the title, one paragraph below it, then the parts as they come."""
    return (
        f"{HEAD}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, html: str) -> None:
    """Write the document, whole or not at all. What UTF-8 cannot hold, such as the odd bytes of a file's name, becomes
    a question mark."""
    write_text(path, html.encode("utf-8", "replace").decode())


def is_page(path: Path) -> bool:
    """Whether a file is one of these pages."""
    try:
        with open(path, "rb") as file:
            return file.read(len(HEAD)) == HEAD.encode()
    except OSError:
        return False


def facts(*pairs: tuple[str, str]) -> str:
    """A row of (number, what it is) cards."""
    cards = (f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in pairs)
    return f'<div class="facts">{"".join(cards)}</div>'


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def folded_section(title: str, *parts: str) -> str:
    """A section that shows its title alone until it is clicked on."""
    content = "\n".join(parts)
    return f"<section>\n<details>\n<summary>{escape(title)}</summary>\n{content}\n</details>\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def commands(lines: Sequence[str]) -> str:
    """Commands to retype, one per line."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table. Columns whose cells are all numbers are set to the right; write numbers as they should be read."""
    numeric = [bool(rows) and all(is_number(str(row[column])) for row in rows) for column in range(len(header))]

    def line(tag: str, cells: Sequence[object]) -> str:
        marks = [' class="number"' if right else "" for right in numeric]
        columns = zip(cells, marks, strict=True)
        return "<tr>" + "".join(f"<{tag}{mark}>{escape(str(cell))}</{tag}>" for cell, mark in columns) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line("th", header)}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def is_number(text: str) -> bool:
    """Whether a cell begins with a number, such as 1,797 or 2.19× or 6 of 20."""
    try:
        float(text.split(" ")[0].replace(",", "").rstrip("%×s"))
    except ValueError:
        return False
    return True


def themed_figure(light: Path, dark: Path, alt: str, caption: str = "") -> str:
    """An image drawn for light and for dark pages (PNG files); `alt` describes it to those who cannot see it."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><picture><source srcset="{data_uri(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{data_uri(light)}" alt="{escape(alt, quote=True)}"></picture>{note}</figure>'
    )


def panel(title: str, *parts: str) -> str:
    """A small titled part; several stand beside each other where there is room."""
    return f'<div class="panel"><h3>{escape(title)}</h3>{"".join(parts)}</div>'


def legend(names: Sequence[str]) -> str:
    """Names of runs in their colours and lines, which are those of `plots.look_of`."""
    items = (
        f'<span><i style="border-top: 3px {("solid", "dashed", "dotted")[place // SERIES % 3]} '
        f'var(--series-{place % SERIES})"></i>{escape(name)}</span>'
        for place, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def side_by_side(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Parts in rows that have a name and columns that have a title; a narrow page scrolls them sideways."""
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    body = "".join(
        f'<tr><th class="row" colspan="{len(columns)}">{escape(name)}</th></tr>'
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="images"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def image(uri: str, alt: str) -> str:
    """An image from a data URI."""
    return f'<img src="{uri}" alt="{escape(alt, quote=True)}">'


def tiles(images: np.ndarray, titles: Sequence[str], wrong: Sequence[bool] = ()) -> str:
    """Small images, each under its title, as many in a row as there is room for; `wrong` ones have it in red.

    images: (N, H, W, 3) uint8, or (N, K, H, W, 3) for K images below each other in every tile.
    """
    stacks = images if images.ndim == 5 else images[:, None]
    marks = wrong or [False] * len(titles)
    parts = (
        f'<figure class="tile{" wrong" if mark else ""}"><figcaption>{escape(title)}</figcaption>'
        + "".join(f'<img src="{png_uri(one)}" alt="">' for one in stack)
        + "</figure>"
        for stack, title, mark in zip(stacks, titles, marks, strict=True)
    )
    return f'<div class="tiles">{"".join(parts)}</div>'


def png_uri(pixels: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as text that an <img> can hold."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return as_data_uri(buffer.getvalue())


def data_uri(path: Path) -> str:
    """A PNG file as text that an <img> can hold."""
    return as_data_uri(path.read_bytes())


def as_data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


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
