"""The measurement: each run once for its images, FLOPs and memory, then all of them taking turns."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import median

import torch
from cases import Case
from haste._compat import flop_counter
from haste.errors import UserError
from torch import Tensor
from variants import EAGER, LAUNCHED, MODULE, UNCACHED, Run, clock_of, make_runs

from haste_ext.bench.compare import why_absent
from haste_ext.bench.measure import describe_machine, memory_within_the_machine, peak_extra_bytes

# How far apart two ways to write the same forecast may end, relative to the images: they round differently. On the
# digits' model a forecast of order 3 in place of 4 makes 1e-6, one of order 0 makes 1e-2: in bfloat16 only gross faults
# can be seen.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


def measure(case: Case, rounds: int, launches: Sequence[str] = (LAUNCHED,)) -> dict[str, object]:
    """What the JSON document holds of one case."""
    machine = describe_machine(case.device)  # the commit that is measured, whatever becomes of the tree meanwhile
    rows: dict[str, dict] = {}
    able: dict[str, Run] = {}
    images: dict[str, Tensor] = {}
    with memory_within_the_machine(case.device), torch.no_grad():
        for run in ready(case, launches):
            rows[run.name] = row = {"name": run.name, "launch": run.launch}
            launched = rows[run.variant.name]  # the same work, call by call
            if "absent" in launched:
                row["absent"] = launched["absent"]
                continue
            try:
                images[run.name] = first_run(run, row)
            except UserError:  # settings that make no sense
                raise
            except Exception as error:  # memory that runs out, a compiler that is missing
                if run.variant is UNCACHED:
                    raise not_measured(case, error) from error
                row["absent"] = why_absent(error)
            else:
                row.setdefault("flops", launched.get("flops"))
                able[run.name] = run
        difference = compare(case, images)
        times = time_in_rounds(able, rounds, case.device)
    for name, row in rows.items():
        row |= times.get(name, {})
    return {
        "case": case.as_json(),
        "machine": machine,
        "settings": {"rounds": rounds},
        "difference": difference,
        "rows": list(rows.values()),
    }


def ready(case: Case, launches: Sequence[str]) -> list[Run]:
    """Every run, the first of which has made a step: what a process sets up once is no run's memory."""
    try:
        runs = make_runs(case, launches)
        first_run(runs[0], {})
        return runs
    except RuntimeError as error:
        raise not_measured(case, error) from error


def not_measured(case: Case, error: Exception) -> UserError:
    where = f"{case.model} at --resolution {case.resolution} and --batch-size {case.batch}"
    return UserError(f"{where} cannot be measured: {why_absent(error)}")


def first_run(run: Run, row: dict) -> Tensor:
    """Sample once; put into the row what does not change from run to run."""
    steps = run.num_steps if run.variant.cached else 1  # without a cache all steps are alike
    images: list[Tensor] = []

    def sample() -> tuple[()]:
        images.append(run(steps))
        return ()

    # The counter sees what is launched call by call; where it watches, nothing is compiled.
    counter = flop_counter() if run.launch == LAUNCHED else None
    with counter or nullcontext():
        row["peak_extra_bytes"] = peak_extra_bytes(sample, run.case.device, calls=1)
    if counter is not None:
        row["flops"] = counter.get_total_flops() * run.num_steps // steps
    row["num_steps"] = run.num_steps
    row["num_full"] = run.num_steps - run.stopwatch.num_forecast
    row["cache_bytes"] = run.cache_bytes
    return images[0]


def compare(case: Case, images: Mapping[str, Tensor]) -> float | None:
    """The relative difference of TaylorSeer's images, ours from the eager ones; UserError where it is too large."""
    if EAGER.name not in images or MODULE.name not in images:
        return None
    ours, eager = images[MODULE.name].double(), images[EAGER.name].double()
    difference = ((ours - eager).norm() / eager.norm()).item()
    if not difference <= TOLERANCE[case.dtype]:
        raise UserError(
            f"{case.model} is not timed: {MODULE.name}, the images differ from those of {EAGER.name} by "
            f"{difference:.1e}; it must be at most {TOLERANCE[case.dtype]:.0e}"
        )
    return difference


def time_in_rounds(runs: Mapping[str, Run], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run, and the medians of its full and its skipped steps: one number of each per round.

    A machine drifts, so ratios are taken within a round, and every round has another order.
    """
    times = {name: {"seconds": [], "full_seconds": [], "skipped_seconds": []} for name in runs}
    names = list(runs)
    for turn in range(rounds):
        gc.collect()
        for name in random.Random(turn).sample(names, len(names)):
            stopwatch = runs[name].stopwatch
            times[name]["seconds"].append(seconds_of(runs[name], device))
            for kind, full in (("full_seconds", True), ("skipped_seconds", False)):
                times[name][kind] += [median(seconds)] if (seconds := stopwatch.seconds(full)) else []
    return times


def seconds_of(run: Run, device: str) -> float:
    synchronize(device)
    clock = clock_of(run.case)
    begin = clock()
    run()
    synchronize(device)
    return clock() - begin


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
