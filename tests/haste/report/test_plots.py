from __future__ import annotations

import re

import numpy as np
import pytest
from haste.plotting import LIGHT
from haste.report.page import Panel, difference, exact_curve, legend, look_of, panels_html, plot, smooth_curve
from PIL import Image


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
