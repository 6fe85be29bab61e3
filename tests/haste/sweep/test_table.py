from __future__ import annotations

from haste.sweep.advice import table
from haste.tables import markdown_table, text_table
from sweep_rows import cached_row, plain_row

ROWS = [
    plain_row(50, 2.0, label_accuracy=0.95, label_accuracy_spread=0.004, fd_spread=0.1),
    cached_row(4, 0.015, 2.5, 41.25, label_accuracy=0.9, cache_bytes=3 * 2**19, peak_bytes=None),
]


def test_markdown_has_a_row_per_point_and_every_number():
    head, ruler, full, cached = markdown_table(table(ROWS)).splitlines()
    assert head.count("|") == ruler.count("|") == full.count("|") == cached.count("|")
    cells = dict(zip(head.split("|"), cached.split("|"), strict=True))
    assert {name.strip(): value.strip() for name, value in cells.items() if name} == {
        "setting": "Taylor per module, interval 4, order 1, 50 steps",
        "full": "13/50",
        "ms/image": "15.00",
        "speed-up": "3.33×",
        "GFLOPs": "13.00",
        "FLOPs speed-up": "3.85×",
        "kept": "0.87",
        "cache MiB": "1.5",
        "peak MiB": "–",
        "FD": "2.500",
        "accuracy %": "90.0",
        "PSNR dB": "41.2",
        "SSIM": "0.900",
    }
    assert "| 2.000 ± 0.100 | 95.0 ± 0.4 |" in full


def test_columns_of_which_nothing_is_known_are_left_out():
    text = markdown_table(table([plain_row(50, 2.0, peak_bytes=None)]))
    for name in ("label_accuracy", "PSNR", "SSIM", "peak"):
        assert name not in text


def test_the_terminals_columns_are_aligned():
    lines = text_table(table(ROWS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    end = lines[0].index("ms/image") + len("ms/image")
    assert all(line[end : end + 2] == "  " for line in lines)
