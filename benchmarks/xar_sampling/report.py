"""The tables, made from the JSON document alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from cases import EXACT, PUBLISHED
from haste.tables import markdown_table

from haste_ext.bench.measure import spread
from haste_ext.bench.report import revision, where

# By batch and row: how many times faster than another row it is to be.
AIMS = {
    1: {EXACT: (2.0, PUBLISHED), f"{EXACT}, forecast": (3.0, PUBLISHED), f"{EXACT}, staggered": (1.5, EXACT)},
    8: {EXACT: (1.4, PUBLISHED), f"{EXACT}, forecast": (2.0, PUBLISHED)},
}
LEGEND = """\
Seconds per image: a whole run, from noise to latents, over the batch; the median of the rounds with the 20th and 80th
percentile. The speed-up is the published loop's time over the row's own within each round. Rounds are what a run takes
one after the other, evaluations what of them go through the network. FLOPs: of all matrix products for one image.
Keys and values: at the end of a run, of the whole batch. Difference: of the images from the published loop's with the
same random numbers, relative, in the 2-norm; beside it as PSNR. Weights are random: the differences of forecast and
staggered runs say that they are other images, not how good these are."""
COLUMNS = (
    "run", "rounds", "evaluations", "TFLOPs", "s per image", "p20 – p80", "times faster", "p20 – p80",
    "keys and values MiB", "difference", "PSNR dB",
)  # fmt: skip


def report(document: Mapping) -> str:
    """All cases as Markdown."""
    return "\n\n".join(["# Sampling from xAR", LEGEND, *map(section, document["results"])]) + "\n"


def section(result: Mapping) -> str:
    machine, case, rounds = result["machine"], result["case"], result["settings"]["rounds"]
    made = (
        f"{where(machine)}; torch {machine['torch']}, haste_ext {machine['haste_ext']}{revision(machine)}, "
        f"{machine['date']}; {rounds} round{'s' if rounds > 1 else ''}; forecast: interval {case['interval']}, order "
        f"{case['order']}; staggered by {case['stagger']} steps."
    )
    return "\n\n".join([f"## {title(result)}", made, table(result), *verdicts(result)])


def title(result: Mapping) -> str:
    case = result["case"]
    return (
        f"{case['model']}, batch {case['batch']}, {case['num_steps']} steps a cell, guidance {case['cfg_scale']:g}, "
        f"{case['dtype']}"
    )


def table(result: Mapping) -> str:
    return markdown_table([COLUMNS, *([row["name"], *row_cells(result, row)] for row in result["rows"])]).rstrip()


def row_cells(result: Mapping, row: Mapping) -> list[str]:
    batch = result["case"]["batch"]
    time, ratio = spread([seconds / batch for seconds in row["seconds"]]), spread(speedups(result, row, PUBLISHED))
    return [
        f"{row['rounds']}",
        f"{row['evaluations']}",
        f"{row['flops'] / 1e12:.2f}",
        f"{time['median']:.2f}",
        f"{time['p20']:.2f} – {time['p80']:.2f}",
        f"{ratio['median']:.2f}×",
        f"{ratio['p20']:.2f} – {ratio['p80']:.2f}",
        f"{row['cache_bytes'] / 2**20:,.0f}",
        "–" if row["name"] == PUBLISHED else f"{row['difference']:.1e}",
        f"{row['psnr']:.1f}" if row["name"] != PUBLISHED and math.isfinite(row["psnr"]) else "–",
    ]


def verdicts(result: Mapping) -> list[str]:
    """The aims of float32, met or missed."""
    case, lines = result["case"], []
    aims = AIMS.get(case["batch"], {}) if case["dtype"] == "float32" else {}
    for row in result["rows"]:
        if row["name"] in aims:
            aim, other = aims[row["name"]]
            found = median(speedups(result, row, other))
            verdict = "met" if found >= aim else "missed"
            lines.append(f"- {row['name']}: {found:.2f}× “{other}”; aim {aim:g}: {verdict}.")
    return ["\n".join(lines)] if lines else []


def speedups(result: Mapping, row: Mapping, other: str) -> list[float]:
    """Within each round, over the row of that name."""
    base = next(r for r in result["rows"] if r["name"] == other)
    return [theirs / own for theirs, own in zip(base["seconds"], row["seconds"], strict=True)]
