from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from haste.plotting import LIGHT
from haste.report.page import (
    Panel,
    commands,
    data_uri,
    difference,
    exact_curve,
    facts,
    folded_section,
    image,
    is_number,
    legend,
    look_of,
    panel,
    panels_html,
    paragraph,
    plot,
    render_page,
    section,
    side_by_side,
    smooth_curve,
    table,
    themed_figure,
    tiles,
    write_page,
)
from PIL import Image

VOID = {"meta", "img", "source", "br"}


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


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "png.png"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(path)
    return path


def test_a_page_is_well_formed_and_fetches_nothing(png):
    html = render_page(
        "Title",
        "Lead",
        facts(("1.5", "fd")),
        section("Images", themed_figure(png, png, "a png", "what it shows")),
        section("Numbers", table(("step", "value"), [(1, 2.5)]), commands(["haste train", "haste sample"])),
        folded_section("More", paragraph("text")),
    )
    assert html.startswith("<!doctype html>")
    text = parse(html).text
    for word in ("Title", "Lead", "fd", "what it shows", "2.5", "haste train\nhaste sample", "More"):
        assert word in text
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(links) == 2 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_what_comes_from_outside_is_escaped(png):
    evil = '<script>"x"&'
    for html in (
        paragraph(evil),
        section(evil),
        folded_section(evil),
        commands([evil]),
        table((evil,), [(evil,)]),
        facts((evil, evil)),
        themed_figure(png, png, evil, evil),
        panel(evil, ""),
        legend([evil]),
        side_by_side([evil], [(evil, [""])]),
        image("data:", evil),
        render_page(evil, evil),
    ):
        assert "<script>" not in html
        parse(html)
    assert 'alt="&lt;script&gt;&quot;x&quot;&amp;"' in themed_figure(png, png, evil)


def test_a_data_uri_holds_the_files_bytes(png):
    kind, content = data_uri(png).split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == png.read_bytes()


def test_light_and_dark_pages_get_their_own_image(tmp_path, png):
    dark = tmp_path / "dark.png"
    Image.new("RGB", (3, 2)).save(dark)
    html = themed_figure(png, dark, "alt")
    both = (
        r'<picture><source srcset="([^"]*)" media="\(prefers-color-scheme: dark\)">'
        r'<img src="([^"]*)"[^>]*></picture>'
    )
    assert re.search(both, html).groups() == (data_uri(dark), data_uri(png))


def test_only_columns_of_numbers_are_set_to_the_right():
    html = table(("name", "value", "mixed"), [("a", "1,000", "1"), ("b", "95.0%", "none")])
    assert html.count('<td class="number">') == 2 and html.count('<th class="number">') == 1
    assert re.findall(r"<td[^>]*>([^<]*)</td>", html) == ["a", "1,000", "1", "b", "95.0%", "none"]


def test_numbers_are_recognised_with_their_units():
    assert all(map(is_number, ["1", "-2.5", "1,797", "95%", "2.19×", "3.1 s", "6 of 20", "1e-3"]))
    assert not any(map(is_number, ["", "none", "1:1,2:2,3:3", "step 20", "s"]))


def test_tiles_are_images_of_their_own_under_their_titles():
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    html = tiles(images, ["cat <1>", "3 → 5"], [False, True])
    assert html.count("data:image/png;base64,") == 6 and html.count('class="tile"') == html.count('class="tile wrong"')
    assert "cat &lt;1&gt;" in html
    parse(html)


def test_what_utf8_cannot_hold_is_a_question_mark(tmp_path):
    write_page(tmp_path / "index.html", "a\ud800b")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "a?b"


def test_a_page_is_written_whole(tmp_path):
    write_page(tmp_path / "index.html", "<p>ä</p>")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "<p>ä</p>"
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_the_difference_is_taken_where_both_runs_were_logged():
    base = [(step, 10.0) for step in range(0, 50, 10)]
    one = difference(1, [(step, 12.0) for step in range(15, 100, 5)], base)
    assert one.place == 1 and list(one.steps) == [15, 20, 25, 30, 35, 40] and (one.values == 2.0).all()
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
def test_any_numbers_can_be_shown(tmp_path, points, log):
    plot(tmp_path / "a.png", Panel("", [exact_curve(0, points)], points=True, log=log), points[-1][0], LIGHT)
    assert Image.open(tmp_path / "a.png").width > 400


def test_a_panel_is_legible_on_a_telephone():
    """12-point text in a figure that is shown 330 pixels wide: at least 10 pixels high."""
    html = panels_html([Panel("A <loss>", [exact_curve(0, [(1, 1.0), (2, 2.0)])])], 2)
    assert "A &lt;loss&gt;" in html and html.count("data:image/png") == 2
    from haste.report import page

    assert 330 / page.SIZE[0] * page.FONT_POINTS / 72 >= 10


def test_the_legend_has_the_colours_and_lines_of_the_curves():
    html = legend([f"run {place}" for place in range(8)])
    found = re.findall(r"border-top: 3px (\w+) var\(--series-(\d)\)", html)
    for place, (line, colour) in enumerate(found):
        look = look_of(place, LIGHT)
        assert look["color"] == LIGHT.series[int(colour)]
        assert look["linestyle"] == {"solid": "-", "dashed": "--", "dotted": ":"}[line]
    assert len(found) == 8 and found[0] != found[6]
