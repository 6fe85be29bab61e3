"""The parts of a report page: each function returns HTML, `render_page` puts them together into one file.

Pictures go in as data URIs, so that the file can be sent by mail and opened without a network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from haste.io import write_text
from haste.report.style import SERIES, STYLE_SHEET

# How every page begins, by which it is known again.
HEAD = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="haste">'


def render_page(title: str, lead: str, *parts: str) -> str:
    """A whole HTML document: the title, one paragraph below it, then the parts as they come."""
    return (
        f'{HEAD}\n'
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
    """A picture drawn for light and for dark pages (PNG files); `alt` describes it to those who cannot see it."""
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
