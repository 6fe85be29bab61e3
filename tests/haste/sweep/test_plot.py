from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from haste.plotting import LIGHT, styled
from haste.sweep.plot import FD, FIDELITY, SECONDS, plot_panel, plot_sweep, write_labels
from PIL import Image
from sweep_rows import cached_row, plain_row

PLAIN = [plain_row(50, 2.0), *(plain_row(steps, 2.0 + 5.0 / steps, 20.0 + steps) for steps in (25, 20, 14, 10))]
CROWD = [
    cached_row(interval, 0.03 / interval + 0.0005 * order, 2.0 + 0.01 * interval, 50.0 - interval, order=order)
    for interval in (3, 4, 5, 6)
    for order in (1, 2, 3, 4)
]


def test_an_image_has_a_panel_for_each_pair_of_measures_that_are_known(tmp_path):
    rows = [*PLAIN[:2], *CROWD[:2], cached_row(4, 0.01, 9.0, 20.0, cache="newton", granularity="model")]
    plot_sweep(tmp_path / "whole.png", rows, title="A sweep", chosen=rows[-1])
    plot_sweep(tmp_path / "one.png", rows[:1], title="A full run alone")
    plot_sweep(tmp_path / "less.png", [replace(r, psnr=None, peak_bytes=None) for r in rows], title="A sweep")
    whole, less = (Image.open(tmp_path / name).size for name in ("whole.png", "less.png"))
    assert less[0] < 0.75 * whole[0] and less[1] < 0.65 * whole[1]  # two panels of six


@pytest.mark.parametrize("quality", [FD, FIDELITY])
def test_labels_hide_neither_each_other_nor_a_point(quality):
    rows = [*PLAIN, *CROWD]
    with styled(LIGHT):
        figure, axes = plt.subplots(figsize=(6, 4))
        plot_panel(axes, rows, SECONDS, quality, LIGHT)
        figure.canvas.draw()
        write_labels(axes, rows, SECONDS, quality, LIGHT)
        boxes = [text.get_window_extent() for text in axes.texts]
        shown = [row for row in rows if quality.value(row) is not None]
        line = axes.lines[0].get_path().transformed(axes.transData)
        points = axes.transData.transform([(SECONDS.value(row), quality.value(row)) for row in shown])
        plt.close(figure)
    assert {"50", "25", "20", "14", "10"} - {text.get_text() for text in axes.texts} <= {"50"}
    assert len(boxes) > len(shown) // 2
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:index]) == 0
        assert not any(box.contains(*point) for point in points)
        assert not line.intersects_bbox(box, filled=False)
