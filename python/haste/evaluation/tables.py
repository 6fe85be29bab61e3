"""Results as text: a table, then what is to be said of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from haste.evaluation.evaluate import Result


def results_text(results: Sequence[Result]) -> str:
    """One row per metric, then each caution and each reason once."""
    width = max(len(result.name) for result in results)
    rows = [f"{result.name:<{width}}  {number(result)}" for result in results]
    return "\n".join([*rows, *remarks(results)])


def number(result: Result) -> str:
    """'12.34', '0.0123 ± 0.0021' or '81.2%'; a dash for what cannot be had."""
    if result.value is None:
        return "-"
    if result.key == "label_accuracy":
        return f"{result.value:.1%}"
    if result.key == "kid":
        return f"{result.value:.5f} ± {result.spread:.5f}"
    if result.key == "fd":
        return f"{result.value:.3f}"
    return f"{result.value:.3f}" + (f" ± {result.spread:.3f}" if result.spread is not None else "")


def remarks(results: Sequence[Result]) -> list[str]:
    """Sentences below the table; metrics that share one have it once."""
    lines: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            lines.setdefault(result.note, []).append("" if result.value is not None else result.name.split(" (")[0])
    return [f"No {', '.join(names)}: {note}." if any(names) else note for note, names in lines.items()]


def checkpoints_text(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One row per checkpoint, one column per metric that any of them has, then the remarks."""
    measured = {result.key for _, results in rows for result in results if result.value is not None}
    columns = [result for result in rows[0][1] if result.key in measured]
    cells = [["step", *(result.name for result in columns)]]
    for name, results in rows:
        by_key = {result.key: result for result in results}
        cells.append([name, *(number(by_key[column.key]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([*lines, *dict.fromkeys(line for _, results in rows for line in remarks(results))])


def fidelity_text(summary: dict[str, Any]) -> str:
    """PSNR and SSIM of images with their baselines."""
    psnr = "-" if summary["psnr"] is None else f"{summary['psnr']:.2f} dB, worst 5 %: {summary['psnr_worst']:.2f} dB"
    lines = [
        f"PSNR  {psnr}",
        f"SSIM  {summary['ssim']:.4f}, worst 5 %: {summary['ssim_worst']:.4f}",
    ]
    if summary["identical"]:
        same, all_ = summary["identical"], summary["images"]
        lines.append(f"{same:,} of {all_:,} images are identical; PSNR is of the others.")
    return "\n".join(lines)


def steps_text(errors: np.ndarray) -> str:
    """The relative error of the state, (steps, images), after each quarter of the steps."""
    places = sorted({max(round(share * len(errors)), 1) for share in (0.25, 0.5, 0.75, 1.0)})
    parts = [f"{errors[place - 1].mean():.2e} after step {place}" for place in places]
    return f"Relative error of the state, mean of {errors.shape[1]} images: {', '.join(parts)}."
