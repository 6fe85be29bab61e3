"""What a call costs the host, whatever its size: each loss on tiny tensors, beside a torch.autograd.Function that does
nothing.

That Function takes the same operands, keeps them for its backward, and gives an empty scalar and empty gradients: what
any operation of Python must do that torch can differentiate. On a GPU the kernels of such tensors take less time than
the host needs to start them, so that there, too, it is the host that is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from haste_ext.bench.cli import OPERATIONS, positive, whole_number
from haste_ext.bench.machine import describe_machine
from haste_ext.bench.measure import CpuTimer, spread, times_in_turns
from haste_ext.bench.operation import Operation, bind
from haste_ext.bench.report import headline

TINY = {"heads": 1, "student_dim": 8, "teacher_dim": 8, "feature_dim": 8}
LOSSES = [name for name, op in OPERATIONS.items() if len(op.results) > 1]
TRIVIAL = "trivial Function"


def trivial_function(differentiable: int) -> Callable[..., Tensor]:
    """Of any operands, the first `differentiable` of which get gradients."""

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


def measure(op: Operation, device: str, min_seconds: float) -> dict[str, object]:
    """Host seconds of forward + backward, ours beside the trivial Function's, in turns."""
    own = {name: TINY[name] for name in op.case.own_fields()}
    inputs = op.case(1, 2, torch.float32, device, **own).inputs()
    gradients = len(op.results) - 1
    functions = {TRIVIAL: trivial_function(gradients), op.ours: op.contenders[-1].function}
    timers = {name: CpuTimer(bind(function, inputs, gradients, False)) for name, function in functions.items()}
    seconds = {name: spread(times) for name, times in times_in_turns(timers, min_seconds).items()}
    ratio = seconds[op.ours]["median"] / seconds[TRIVIAL]["median"]
    return {"operation": op.name, "seconds": seconds, "ratio": ratio}


def table(document: Mapping) -> str:
    lines = [headline(document), "", f"{'host, forward + backward':<28}{'µs':>8}{'p20 … p80':>18}{'times trivial':>16}"]
    for result in document["results"]:
        for name, times in result["seconds"].items():
            median, low, high = (f"{times[key] * 1e6:.1f}" for key in ("median", "p20", "p80"))
            ratio = "" if name == TRIVIAL else f"{result['ratio']:.2f}"
            label = f"{result['operation']}, trivial" if name == TRIVIAL else result["operation"]
            lines.append(f"{label:<28}{median:>8}{f'{low} … {high}':>18}{ratio:>16}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n\n")[0]  # python -OO has no docstrings
    parser = argparse.ArgumentParser(prog="python -m haste_ext.bench host", description=description)
    parser.add_argument("--op", nargs="+", choices=LOSSES, default=LOSSES, metavar="OP",
                        help=f"of {', '.join(LOSSES)}; default: all")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=whole_number, metavar="N", default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--min-seconds", type=positive, metavar="S", default=2.0, help="per contender; default: 2")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write JSON")
    return parser


def run(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    return {
        "machine": describe_machine(args.device),
        "settings": {"min_seconds": args.min_seconds},
        "roofline": None,
        "results": [measure(OPERATIONS[name], args.device, args.min_seconds) for name in args.op],
    }
