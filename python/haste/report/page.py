"""The parts of a report page: each function returns HTML, `render_page` puts them together into one file.

Pictures go in as data URIs, so that the file can be sent by mail and opened without a network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from haste.io import write_text
from haste.report.style import STYLE_SHEET


def render_page(title: str, lead: str, *parts: str) -> str:
    """A whole HTML document: the title, one paragraph below it, then the parts as they come."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, html: str) -> None:
    """Write the document, whole or not at all."""
    write_text(path, html)


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


def figure(path: Path, alt: str, caption: str) -> str:
    """A PNG file that looks the same on light and on dark pages."""
    return (
        f'<figure><img src="{data_uri(path)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(path: Path) -> str:
    """A PNG file as text that an <img> can hold."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
