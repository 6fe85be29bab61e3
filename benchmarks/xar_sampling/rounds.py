"""The measurement: all runs taking turns, their images held against those of the published loop."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch
from cases import EXACT, PUBLISHED, Case, make_runs
from haste.errors import UserError
from torch import Tensor

from haste_ext.bench.measure import describe_machine

# How far the images may be from the published loop's, relative to these, in the 2-norm. In bfloat16 both round in every
# layer, in other places, which only finds gross faults.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def measure(case: Case, rounds: int, only: Iterable[str] = ()) -> dict[str, Any]:
    """What the JSON document holds of one case."""
    machine = describe_machine("cpu")  # the commit that is measured, whatever becomes of the tree meanwhile
    runs = [run for run in make_runs(case) if not only or run.name in (PUBLISHED, *only)]
    rows = [{"name": run.name, **run.count(), "seconds": []} for run in runs]
    for run in runs[:2]:
        run(1)  # threads, and memory that the process sets up once
    images: dict[str, Tensor] = {}
    for turn in range(rounds):
        gc.collect()
        for place in random.Random(turn).sample(range(len(runs)), len(runs)):
            begin = perf_counter()
            images[runs[place].name] = runs[place]()
            rows[place]["seconds"].append(perf_counter() - begin)
    check(case, images)
    for row in rows:
        row |= errors(images[row["name"]], images[PUBLISHED])
    return {"case": case.as_json(), "machine": machine, "settings": {"rounds": rounds}, "rows": rows}


def check(case: Case, images: dict[str, Tensor]) -> None:
    """UserError if haste's images are not those of the published loop."""
    found = errors(images[EXACT], images[PUBLISHED])["difference"] if EXACT in images else 0.0
    if not found <= TOLERANCE[case.dtype]:
        raise UserError(f"nothing is written for batch {case.batch} in {case.dtype}: {EXACT}'s images differ from the "
                        f"published loop's by {found:.1e}; it must be at most {TOLERANCE[case.dtype]:.0e}")  # fmt: skip


def errors(images: Tensor, reference: Tensor) -> dict[str, float]:
    """The relative difference in the 2-norm, and the PSNR in dB against the reference's range."""
    error, exact = images.double() - reference.double(), reference.double()
    mean_square = error.square().mean().item()
    span = (exact.max() - exact.min()).item()
    psnr = math.inf if mean_square == 0 else 10 * math.log10(span**2 / mean_square)
    return {"difference": (error.norm() / exact.norm()).item(), "psnr": psnr if torch.isfinite(error).all() else 0.0}


def join_rounds(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of one case and commit as one with the rounds of both.

    Raises:
        UserError: other rows.
    """
    if [row["name"] for row in old["rows"]] != [row["name"] for row in new["rows"]]:
        raise UserError("--add must find the same rows in results.json; leave it out to begin anew")
    rows = [{**row, "seconds": before["seconds"] + row["seconds"]}
            for before, row in zip(old["rows"], new["rows"], strict=True)]  # fmt: skip
    rounds = old["settings"]["rounds"] + new["settings"]["rounds"]
    return {**new, "settings": {**new["settings"], "rounds": rounds}, "rows": rows}
