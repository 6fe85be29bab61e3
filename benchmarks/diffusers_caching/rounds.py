"""The measurement: each variant once for its latents, FLOPs and memory, then all of them taking turns."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Mapping
from itertools import pairwise
from time import perf_counter, thread_time
from typing import Any

import torch
from cases import FULL_STEPS, NUM_STEPS, Case
from haste._compat import flop_counter
from torch import Tensor
from variants import INTERVAL, ORDER, UNCACHED, VARIANTS, Sampler

from haste_ext.bench.measure import describe_machine

Row = dict[str, Any]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """What the JSON document holds of one case."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    machine = describe_machine("cpu")
    rows: list[Row] = []
    able: dict[str, Sampler] = {}
    latents: dict[str, Tensor] = {}
    for variant in VARIANTS:
        row: Row = {"name": variant.name, "ours": variant.ours}
        rows.append(row)
        if variant.absent:
            row["absent"] = f"{variant.absent} is not installed here"
            continue
        try:
            sampler = variant.make(case)
            row["note"] = sampler.note
            latents[variant.name] = first_run(sampler, row)
        except Exception as error:  # a peer's fault is a result, whatever it is
            if variant is UNCACHED:
                raise
            row["fault"] = describe(error)
        else:
            row["error"] = relative_error(latents[variant.name], latents[UNCACHED.name])
            able[variant.name] = sampler
    times = time_in_rounds(able, latents, rounds)
    return {
        "case": {"name": case.name, "num_steps": NUM_STEPS, "full_steps": FULL_STEPS, "interval": INTERVAL,
                 "order": ORDER, "dtype": "float32"},
        "machine": machine,
        "settings": {"rounds": rounds},
        "rows": [row | times.get(row["name"], {}) for row in rows],
    }  # fmt: skip


def first_run(sampler: Sampler, row: Row) -> Tensor:
    """Sample twice; put into the row what does not change from run to run. FLOPs are the second run's: the first has
    what is found out once about a model."""
    before = storages()
    latents = sampler()
    held = storages()
    held.pop(latents.untyped_storage().data_ptr(), None)
    row["num_steps"] = sampler.num_steps
    row["cache_bytes"] = sum(size for place, size in held.items() if place not in before)
    with flop_counter() as counter:
        sampler()
    row["flops"] = counter.get_total_flops()
    return latents


def storages() -> dict[int, int]:
    """Address and bytes of the memory of every tensor that lives: the same measure for every cache."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
    memory = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in memory}


def time_in_rounds(able: Mapping[str, Sampler], latents: Mapping[str, Tensor], rounds: int) -> dict[str, Row]:
    """Seconds of each step of each variant, of the thread and by the clock: the least of the rounds.

    Whatever else the machine does only adds to a step, and hits other steps in other rounds, each of which has an order
    of its own. A run whose latents differ from the first run's is noted: a cache that carries something over.
    """
    measured: dict[str, Row] = {name: {"cpu_seconds": [], "wall_seconds": [], "drift": 0.0} for name in able}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(able), len(able)):
            row = measured[name]
            if "fault" in row:
                continue
            gc.collect()
            ticks = [(thread_time(), perf_counter())]
            try:
                again = able[name](lambda ticks=ticks: ticks.append((thread_time(), perf_counter())))
            except Exception as error:
                row |= {"fault": f"a later run: {describe(error)}"}
                continue
            for clock, times in zip(("cpu_seconds", "wall_seconds"), zip(*ticks, strict=True), strict=True):
                seconds = [after - before for before, after in pairwise(times)]
                row[clock] = [min(pair) for pair in zip(row[clock], seconds, strict=True)] if row[clock] else seconds
            row["drift"] = max(row["drift"], relative_error(again, latents[name]))
    return measured


def relative_error(latents: Tensor, reference: Tensor) -> float:
    """‖latents − reference‖ / ‖reference‖."""
    return ((latents.double() - reference.double()).norm() / reference.double().norm()).item()


def describe(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:160]}"
