"""One case of an operation: every contender checked against float64, then all of them timed in turns.

Ours must pass the rule of accuracy, otherwise it is not timed. The others' errors are written down beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from haste_ext.bench.measure import (
    Call,
    CpuTimer,
    GpuTimer,
    make_timers,
    memory_within_the_machine,
    peak_extra_bytes,
    spread,
    times_in_turns,
)
from haste_ext.bench.operations import Case, Contender, Operation, Phase, bind

VERIFY_BYTES = 2 * 2**30  # of float64, which decides how much of the batch is verified
ROTATED_BYTES = 512 * 2**20  # inputs on a GPU are rotated until they are this much, several times any L2
MOST_ROTATED = 256
COPY = "a copy of the same bytes"
TINY = {"heads": 1, "student_dim": 8, "teacher_dim": 8, "feature_dim": 8}
TRIVIAL = "trivial Function"
# max|out − exact| ≤ 2·max|eager − exact| + rounding of the output type
EAGER_FACTOR = 2.0

Roofline = Mapping[str, Any]


@dataclass(frozen=True)
class Accuracy:
    """The largest errors of a result and of eager code in the same type, and what the rule allows."""

    error: float
    eager_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def measure_accuracy(out: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> Accuracy:
    """`out` beside `eager`, the same computation in the same type, and `exact`, the definition in float64.

    The rounding is that of the largest value; where all values cancel to nothing (a single key, a single dimension),
    that of the `terms` which cancel. float64 is its own reference: there only roundings are allowed.
    """
    if exact.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    eps, largest = torch.finfo(out.dtype).eps, exact.abs().max().item()
    error, eager_error = ((x.double() - exact).abs().max().item() for x in (out, eager))
    rounding = eps * (largest if largest > eps * terms else terms)
    if out.dtype == torch.float64:
        rounding = 100 * eps * max(largest, terms)
    return Accuracy(error, eager_error, EAGER_FACTOR * eager_error + rounding)


class NotAccurateError(Exception):
    """Ours breaks the rule of accuracy: there is nothing to time."""


def compare(op: Operation, case: Case, forward_only: bool, min_seconds: float, roofline: Roofline) -> dict:
    """What the benchmark's JSON holds of one case."""
    phases = case.phases()[:1] if forward_only else case.phases()
    least_bytes = sum(phase.bytes for phase in phases)
    work = {
        "bytes": least_bytes,
        "flops": sum(phase.matmul_flops + phase.other_flops for phase in phases),
        "exps": sum(phase.exps for phase in phases),
        "floor_seconds": floor_seconds(phases, name_of(case.dtype), roofline),
    }
    with memory_within_the_machine(case.device):
        rows = contender_rows(op, case, forward_only, min_seconds, least_bytes)
    for row in rows:
        if "seconds" in row:
            median = row["seconds"]["median"]
            row["bytes_per_second"] = work["bytes"] / median
            row["flops_per_second"] = work["flops"] / median if row["name"] != COPY else None
            row["roofline_share"] = work["floor_seconds"] / median
    return {
        "operation": op.name,
        "mode": "forward + backward" if len(phases) > 1 else "forward",
        "case": {**asdict(case), "dtype": name_of(case.dtype)},
        "baseline": op.baseline,
        "ours": op.ours,
        "work": work,
        "rows": rows,
    }


def floor_seconds(phases: Iterable[Phase], dtype: str, roofline: Roofline) -> float:
    """The least time: in every phase that of its slowest part, were all at the measured limits."""
    return sum(max(limits(phase, dtype, roofline).values()) for phase in phases)


def limits(phase: Phase, dtype: str, roofline: Roofline) -> dict[str, float]:
    """Seconds that each part of a phase takes at the least."""
    rates = roofline["matmul_flops_per_second"]
    rate = rates[dtype] if dtype == "float64" else max(rates[dtype], rates["float32"])  # half precision can be widened
    seconds = {
        "memory": phase.bytes / roofline["copy_bytes_per_second"],
        "matmul": phase.matmul_flops / rate,
    }
    if roofline["exps_per_second"]:
        seconds["exp"] = phase.exps / roofline["exps_per_second"]
    return seconds


def contender_rows(op: Operation, case: Case, forward_only: bool, min_seconds: float, copied_bytes: int) -> list[dict]:
    rows: dict[str, dict] = {}
    calls: dict[str, list[Call]] = {}
    try:
        inputs = [case.inputs() for _ in range(rotations(case))]
        references = verification(op, case, inputs[0], forward_only)
        if op.bandwidth_bound:  # first, so that the memory it holds is there when the others are tried
            calls[COPY] = [copy_call(copied_bytes, case.device) for _ in inputs]
    except RuntimeError as error:  # torch's word for memory that runs out
        why = f"the inputs cannot be made: {why_absent(error)}"
        return [{"name": c.name, "absent": why, "failed": c.name == op.ours} for c in op.contenders]
    for contender in op.contenders:
        row = rows[contender.name] = {"name": contender.name}
        missing = contender.missing(case)
        if missing is not None:
            row["absent"] = missing
            continue
        try:
            function = compiled(contender.function) if contender.compiled else contender.function
            row["errors"] = errors(op, contender, function, references, forward_only)
            calls[contender.name] = [bound(op, contender, function, x, forward_only) for x in inputs]
            calls[contender.name][0]()  # compiles, warms up, or shows that it cannot
        except Exception as error:  # a compiler that is missing, a kernel for other types, memory that runs out
            calls.pop(contender.name, None)
            row["absent"] = why_absent(error)
            row["failed"] = contender.name == op.ours
    if COPY in calls:
        rows[COPY] = {"name": COPY}
    timers = make_timers(calls, case.device)
    for name, times in times_in_turns(timers, min_seconds).items():
        rows[name]["seconds"] = spread(times)
        rows[name] |= launching(timers[name])
    timers.clear()  # with the memory that graphs hold
    for name in calls:
        rows[name]["peak_extra_bytes"] = None if name == COPY else peak_extra_bytes(calls[name][0], case.device)
    return list(rows.values())


def launching(timer: CpuTimer | GpuTimer) -> dict[str, object]:
    """What the host takes to launch a call on a GPU, and why no graph could hold it, if none could."""
    if not isinstance(timer, GpuTimer):
        return {}
    return {"host_seconds": spread(timer.host_times()), "timed_by_events": timer.why_events}


def bound(
    op: Operation, contender: Contender, function: Callable[..., Tensor], inputs: Sequence[Tensor], forward_only: bool
) -> Call:
    kept = contender.prepare(*inputs) if contender.prepare else inputs
    return bind(function, kept, gradients=len(op.results) - 1, forward_only=forward_only)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()  # after some eight shapes of one function it would fall back to eager code, silently
    return torch.compile(function, dynamic=False, fullgraph=True)


def verification(op: Operation, case: Case, inputs: list[Tensor], forward_only: bool) -> dict[str, tuple]:
    """Per situation: inputs, as much of the batch as is affordable, with exact and eager results."""
    small = case.reduced_to(VERIFY_BYTES)
    situations = {"random": inputs if small == case else small.inputs()}
    if op.cases_near_convergence and case.dtype != torch.float64:  # there the reference would round as much
        situations["near convergence"] = small.inputs(near=True)
    reference = Contender("definition", op.reference)
    references = {}
    for situation, inputs in situations.items():
        exact = bound(op, reference, op.reference, [x.double() for x in inputs], forward_only)()
        eager = bound(op, reference, op.reference, inputs, forward_only)()
        references[situation] = (inputs, exact, eager)
    return references


def errors(op: Operation, contender: Contender, function: Callable, references: dict, forward_only: bool) -> dict:
    """Per situation and result, the contender's error beside eager's; for ours the rule must hold."""
    found: dict[str, dict] = {}
    for situation, (inputs, exact, eager) in references.items():
        results = bound(op, contender, function, inputs, forward_only)()
        found[situation] = {}
        for name, *tensors in zip(op.result_names(forward_only), results, eager, exact, strict=True):
            accuracy = measure_accuracy(*tensors)
            found[situation][name] = as_json(accuracy)
            if contender.name == op.ours and not accuracy.passed:
                raise NotAccurateError(
                    f"not timed: {name} ({situation}) is off by {accuracy.error:.2e}, "
                    f"the rule allows {accuracy.allowed:.2e}"
                )
    return found


def as_json(accuracy: Accuracy) -> dict[str, float | None]:
    """JSON has neither NaN nor infinity: an error that is not finite is null."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(accuracy).items()}


def rotations(case: Case) -> int:
    """How many sets of inputs take turns: on the CPU one, on a GPU enough to be new to every cache."""
    if case.device == "cpu":
        return 1
    return min(MOST_ROTATED, 1 + ROTATED_BYTES // case.phases()[0].bytes)


def copy_call(size: int, device: str) -> Call:
    """Half of the bytes read, half of them written: as much traffic as the case's least, into memory at hand."""
    source = torch.ones(max(1, size // 8), device=device)
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source),)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_absent(error: Exception) -> str:
    """An error's first words, on one line."""
    text = " ".join(str(error).split()).partition(" Set TORCHDYNAMO_VERBOSE")[0] or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return "it wants more memory than there is"
    return text if len(text) <= 160 else text[:157] + "..."


def trivial_function(differentiable: int) -> Callable[..., Tensor]:
    """A Function that does nothing: of any operands, the first `differentiable` of which get gradients.

    It keeps its operands for the backward and gives an empty scalar and empty gradients: what any operation of Python
    must do that torch can differentiate.
    """

    class Trivial(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands):
            ctx.save_for_backward(*operands)
            return operands[0].new_empty((), dtype=torch.float32)

        @staticmethod
        def backward(ctx, grad):
            operands = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in operands[:differentiable]]
            return *gradients, *(None,) * (len(operands) - differentiable)

    return Trivial.apply


def compare_on_host(op: Operation, device: str, min_seconds: float) -> dict[str, object]:
    """Host seconds of forward + backward on tiny tensors, ours beside the trivial Function's, in turns.

    On a GPU the kernels of such tensors take less time than the host needs to start them: there, too, it is the host
    that is timed.
    """
    own = {name: TINY[name] for name in op.case.own_fields()}
    inputs = op.case(1, 2, torch.float32, device, **own).inputs()
    gradients = len(op.results) - 1
    functions = {TRIVIAL: trivial_function(gradients), op.ours: op.contenders[-1].function}
    timers = {name: CpuTimer(bind(function, inputs, gradients, False)) for name, function in functions.items()}
    seconds = {name: spread(times) for name, times in times_in_turns(timers, min_seconds).items()}
    ratio = seconds[op.ours]["median"] / seconds[TRIVIAL]["median"]
    return {"operation": op.name, "seconds": seconds, "ratio": ratio}
