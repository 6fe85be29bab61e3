from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from haste.plotting import DARK, LIGHT
from haste.report.page import (
    FONT_POINTS,
    SIZE,
    Panel,
    data_uri,
    difference,
    exact_curve,
    is_number,
    is_page,
    line_style,
    number_text,
    png,
    smooth_curve,
    templates,
)
from haste.report.runs import read_run, write_report
from PIL import Image
from report_runs import write_log

VOID = {"meta", "img", "source", "br"}
EVIL = '<script>"x"&'


class Balance(HTMLParser):
    """Fails on a tag that is closed without being open, or left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def render(source: str, **values) -> str:
    """HTML of a template that calls the macros of parts.html."""
    macros = "facts, folded_section, legend, plots, section, table, tiles"
    return templates().from_string(f'{{% from "parts.html" import {macros} with context %}}{source}').render(values)


def panel(title="A loss", **settings) -> Panel:
    return Panel(title, [exact_curve(0, [(1, 1.0), (2, 2.0)])], 2, **settings)


# ---- pages ----


def test_a_page_is_well_formed_and_fetches_nothing():
    html = render(
        """{% extends "page.html" %}{% block title %}Title{% endblock %}{% block lead %}Lead{% endblock %}
        {% block content %}{% from "parts.html" import facts, folded_section, plots, section, table with context %}
        {{ facts([("1.5", "fd")]) }}
        {% call section("Numbers") %}{{ plots([panel]) }}{{ table(("step", "value"), [(1, 2.5)]) }}{% endcall %}
        {% call folded_section("More") %}text{% endcall %}{% endblock %}""",
        panel=panel(),
    )
    html = html.strip()
    assert html.startswith("<!doctype html>")
    text = parse(html).text
    for word in ("Title", "Lead", "fd", "A loss", "2.5", "More"):
        assert word in text
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(links) == 2 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in html and "url(" not in html and "@import" not in html


@pytest.mark.parametrize(
    "source",
    [
        "{% call section(evil) %}{{ evil }}{% endcall %}",
        "{% call folded_section(evil) %}{{ evil }}{% endcall %}",
        "{{ table((evil,), [(evil,)]) }}",
        "{{ facts([(evil, evil)]) }}",
        "{{ plots([panel]) }}",
        "{{ legend([evil]) }}",
        "{{ tiles([([], evil, false)]) }}",
    ],
)
def test_text_from_outside_is_escaped(source):
    html = render(source, evil=EVIL, panel=panel(EVIL))
    assert "<script>" not in html and "&lt;script&gt;&#34;x&#34;&amp;" in html
    parse(html)


def test_a_page_is_written_whole_and_known_again(tmp_path, without_figures):
    run = write_log(tmp_path, "run", stop=None)
    write_report([read_run(run)], tmp_path / "index.html")
    assert is_page(tmp_path / "index.html") and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "other.html").write_text("<!doctype html><html>")
    assert not is_page(tmp_path / "other.html") and not is_page(tmp_path / "none.html")


def test_what_utf8_cannot_hold_is_a_question_mark(tmp_path, without_figures):
    run = write_log(tmp_path, "run", stop=None)
    write_report([replace(read_run(run), name="ä\ud800b")], tmp_path / "index.html")
    assert "<h1>Run ä?b</h1>" in (tmp_path / "index.html").read_text(encoding="utf-8")


# ---- parts ----


def test_a_data_uri_holds_the_bytes_of_an_image():
    content = png(np.full((2, 3, 3), 7, np.uint8))
    kind, text = data_uri(content).split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(text) == content
    assert Image.open(io.BytesIO(content)).size == (3, 2)


def test_light_and_dark_pages_get_their_own_plot():
    html = render("{{ plots([panel]) }}", panel=panel())
    both = (
        r'<picture>\s*<source srcset="([^"]*)" media="\(prefers-color-scheme: dark\)">\s*'
        r'<img src="([^"]*)" alt="A loss over training steps"></picture>'
    )
    assert re.search(both, html).groups() == (data_uri(panel().png(DARK)), data_uri(panel().png(LIGHT)))


def test_only_columns_of_numbers_are_set_to_the_right():
    rows = [("a", "1,000", "1"), ("b", "95.0%", "none")]
    html = render("{{ table(('name', 'value', 'mixed'), rows) }}", rows=rows)
    assert html.count('<td class="number">') == 2 and html.count('<th class="number">') == 1
    assert re.findall(r"<td[^>]*>([^<]*)</td>", html) == ["a", "1,000", "1", "b", "95.0%", "none"]
    parse(render("{{ table(('Flag', 'a run'), []) }}"))


def test_numbers_are_recognised_with_their_units():
    assert all(map(is_number, ["1", "-2.5", "1,797", "95%", "2.19×", "3.1 s", "6 of 20", "1e-3"]))
    assert not any(map(is_number, ["", "none", "1:1,2:2,3:3", "step 20", "s"]))


def test_numbers_of_a_log_are_short_whatever_their_size():
    assert [number_text(value, 2) for value in (None, 1234.567, -2e300)] == ["–", "1,234.57", "-2.000e+300"]


def test_tiles_are_images_of_their_own_under_their_titles():
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    html = render("{{ tiles(tiles_) }}", tiles_=[(images[0], "cat <1>", False), (images[1], "3 → 5", True)])
    assert html.count("data:image/png;base64,") == 6 and html.count('class="tile"') == html.count('class="tile wrong"')
    assert "cat &lt;1&gt;" in html
    parse(html)


# ---- plots ----


def test_the_difference_is_taken_where_both_runs_were_logged():
    base = [(step, 10.0) for step in range(0, 50, 10)]
    one = difference(1, [(step, 12.0) for step in range(15, 100, 5)], base)
    assert one.run == 1 and list(one.steps) == [15, 20, 25, 30, 35, 40] and (one.values == 2.0).all()
    assert difference(1, [(100, 1.0), (110, 1.0)], base) is None


def test_scatter_that_both_runs_share_falls_out():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    base = list(zip(range(200), noise, strict=True))
    own = list(zip(range(200), noise - 0.1, strict=True))
    assert difference(1, own, base).values == pytest.approx(np.full(200, -0.1))


def test_curves_of_several_runs_are_smoother():
    points = list(zip(range(200), np.random.default_rng(0).normal(size=200), strict=True))
    alone, beside = smooth_curve(0, points, alone=True), smooth_curve(0, points, alone=False)
    assert beside.values.std() < 0.8 * alone.values.std()
    assert beside.faint is None and len(alone.faint) == 200


@pytest.mark.parametrize(
    "points",
    [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(0, -1e30), (2**53, 1e30)], [(1, 1e-30), (2, 1e-29)], [(0, 5.0)]],
)
@pytest.mark.parametrize("log", [False, True])
def test_any_numbers_can_be_shown(points, log):
    content = Panel("", [exact_curve(0, points)], points[-1][0], points=True, log=log).png(LIGHT)
    assert Image.open(io.BytesIO(content)).width > 400


def test_an_axis_ends_where_values_end():
    shown = Panel("", [exact_curve(0, [(4, 0.02)])], 4, points=True, bounds=(0.0, 1.0))
    _, axes = plt.subplots()
    shown._scale(axes)
    assert axes.get_ylim() == (0.0, pytest.approx(0.12))
    plt.close()


def test_a_panel_is_legible_on_a_telephone():
    """12-point text in a figure that is shown 330 pixels wide: at least 10 pixels high."""
    assert 330 / SIZE[0] * FONT_POINTS / 72 >= 10


def test_the_legend_has_the_colours_and_lines_of_the_curves():
    html = render("{{ legend(names) }}", names=[f"run {number}" for number in range(20)])
    found = re.findall(r"border-top: 3px (\w+) var\(--series-(\d)\)", html)
    for run, (line, colour) in enumerate(found):
        style = line_style(run, LIGHT)
        assert style["color"] == LIGHT.series[int(colour)]
        assert style["linestyle"] == {"solid": "-", "dashed": "--", "dotted": ":"}[line]
    assert len(found) == 20 and len(set(found)) == 18
