from __future__ import annotations

from haste.tables import format_number, known_columns, markdown_table, text_table

ROWS = [["step", "FD", "KID"], ["2", "10.000", "–"], ["1,000", "3.500", "–"]]


def test_columns_of_text_have_equal_width_and_their_sides():
    assert text_table(ROWS).splitlines() == ["step       FD  KID", "2      10.000    –", "1,000   3.500    –"]
    assert text_table(ROWS, ">").splitlines()[1] == "    2  10.000    –"
    assert text_table(ROWS, "<").splitlines()[1] == "2      10.000  –"


def test_markdown_has_a_ruler_below_its_header():
    assert markdown_table(ROWS).splitlines()[:3] == [
        "| step | FD | KID |",
        "|---|---:|---:|",
        "| 2 | 10.000 | – |",
    ]


def test_columns_of_which_nothing_is_known_are_left_out():
    assert known_columns(ROWS[0], ROWS[1:]) == [row[:2] for row in ROWS]


def test_numbers_have_separators_a_spread_or_a_dash():
    assert format_number(1234.5, 1) == "1,234.5" and format_number(None, 1) == "–"
    assert format_number(0.5, 1, 100.0, spread=0.02) == "50.0 ± 2.0"
