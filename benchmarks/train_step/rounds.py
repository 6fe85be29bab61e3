"""Measures one case: the contenders' peak memory, then their time in rounds."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch
from cases import Case
from haste.caching.memory import free_bytes
from haste.errors import UserError
from haste.models import build_model
from parts import make_parts
from variants import HASTE, VANILLA, VARIANTS, Contender, Variant, make_contenders

from haste_ext.bench.compare import why_absent
from haste_ext.bench.measure import describe_machine, memory_within_the_machine, peak_extra_bytes, times_of

STEPS_PER_TURN = {"cpu": 1, "cuda": 5}
WARM_UP_STEPS = {"cpu": 0, "cuda": 1}  # before each turn: the allocator's blocks are cut to the last contender's sizes
PART_SECONDS = 0.2  # for which a part is called in each round
BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, all float32


def measure(case: Case, rounds: int, variants: Sequence[Variant] = VARIANTS) -> dict[str, object]:
    """What the JSON document holds of one case; vanilla and HASTE are among the variants."""
    check_memory(case)
    machine = describe_machine(case.device)  # the commit that is measured, whatever becomes of the tree meanwhile
    torch.manual_seed(0)
    with memory_within_the_machine(case.device):
        try:
            contenders = make_contenders(case, variants)
        except RuntimeError as error:  # torch's word for memory that runs out
            raise UserError(f"{describe(case)} cannot be measured: {why_absent(error)}") from error
        rows = {name: memory_row(contender) for name, contender in contenders.items()}
        able = {name: contender for name, contender in contenders.items() if "absent" not in rows[name]}
        for name in (VANILLA.name, HASTE.name):
            if name not in able:
                raise UserError(f"{describe(case)}, {name}, cannot be measured: {rows[name]['absent']}")
        parts = make_parts(able[HASTE.name])
        part_rows = {name: {"name": name, "peak_extra_bytes": part_peak(call, case)} for name, call in parts.items()}
        seconds, part_seconds = time_in_rounds(able, parts, rounds, case.device)
    for name, times in seconds.items():
        rows[name]["seconds"] = times
    return {
        "case": case.as_json(),
        "machine": machine,
        "settings": {"rounds": rounds, "steps_per_turn": STEPS_PER_TURN[case.device]},
        "parameters": sum(p.numel() for p in able[VANILLA.name].model.parameters()),
        "rows": list(rows.values()),
        "parts": [{**part_rows[name], "seconds": times} for name, times in part_seconds.items()],
    }


def describe(case: Case) -> str:
    return f"{case.model} at --resolution {case.resolution} and --batch-size {case.batch}"


def check_memory(case: Case) -> None:
    """UserError if not even the weights, gradients and moments will fit."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(case.student).parameters())
    free = free_bytes(torch.device(case.device))
    needed = BYTES_PER_PARAMETER * parameters
    if needed > free:
        raise UserError(
            f"{case.model} needs {needed / 2**30:.1f} GiB for weights, gradients and AdamW's moments alone, "
            f"and {free / 2**30:.1f} GiB are free; choose a smaller --model"
        )


def memory_row(contender: Contender) -> dict[str, object]:
    """Its memory over one step, which is its first; or why it cannot make one."""
    row = {"name": contender.variant.name}
    try:
        extra = peak_extra_bytes(contender.step, contender.case.device, calls=1)
    except RuntimeError as error:  # torch's word for memory that runs out
        contender.optimizer.zero_grad(set_to_none=True)
        row["absent"] = why_absent(error)
    else:
        held = contender.held_bytes()
        row |= {"held_bytes": held, "peak_bytes": None if extra is None else held + extra}
    return row


def part_peak(call: Callable[[], tuple[()]], case: Case) -> int | None:
    """Bytes beyond what was held; the first call makes what is kept from then on."""
    call()
    return peak_extra_bytes(call, case.device)


def time_in_rounds(
    contenders: Mapping[str, Contender], parts: Mapping[str, Callable[[], tuple[()]]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step of each contender, and per call of each part: one number per round.

    A machine drifts, so ratios are taken within a round, and every round has another order: a step also feels the heap
    or the allocator's blocks that the one before it left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    part_seconds: dict[str, list[float]] = {name: [] for name in parts}
    names = list(contenders)
    for turn in range(rounds):
        gc.collect()
        for name in random.Random(turn).sample(names, len(names)):
            seconds[name].append(seconds_per_step(contenders[name], device))
        for name, call in parts.items():
            part_seconds[name].append(torch.tensor(times_of([call], PART_SECONDS, device)).median().item())
    return seconds, part_seconds


def seconds_per_step(contender: Contender, device: str) -> float:
    for _ in range(WARM_UP_STEPS[device]):
        contender.step()
    synchronize(device)
    begin = perf_counter()
    for _ in range(STEPS_PER_TURN[device]):
        contender.step()
    synchronize(device)
    return (perf_counter() - begin) / STEPS_PER_TURN[device]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
