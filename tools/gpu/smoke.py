"""Every kernel once on small problems, smallest first, each named before it runs, so that what hangs names itself.

    python tools/gpu/smoke.py [cuda | cpu] [--groups shared portable hopper] [--sanitized]

Values and gradients must be near those in float64 and the same bits twice. Near is a few times what the rule of
accuracy allows: the rule itself is for the tests, and a rare sample on which eager code is lucky must not cost a whole
run. HASTE_CUDA_KERNELS chooses between the portable kernels and Hopper's. --sanitized: a few problems, unchecked, for
a run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import sys
import time

import records
import torch
from problems import GROUPS, Problem, problems

import haste_ext
from haste_ext import reference
from haste_ext.bench.compare import measure_accuracy

LENIENCE = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS[:2])
    parser.add_argument("--sanitized", action="store_true")
    arguments = parser.parse_args()
    heavy = arguments.device == "cuda"
    chosen = [p for group in arguments.groups for p in problems(group, arguments.sanitized, heavy)]
    records.write(planned=[problem.name for problem in chosen])
    failed = [p.name for p in chosen if not attempt(p, arguments.device, checked=not arguments.sanitized)]
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} are right" if failed else f"all {len(chosen)} done", flush=True
    )
    return int(bool(failed))


def attempt(problem: Problem, device: str, checked: bool) -> bool:
    """Runs one problem, prints and records it. After an error of the device nothing can follow in this process."""
    print(problem.name, end=" ... ", flush=True)
    records.write(name=problem.name, result="started")
    begin = time.monotonic()
    try:
        wrong, errors = check(problem, device) if checked else run(problem, device)
    except torch.AcceleratorError:
        records.write(name=problem.name, result="failed")
        raise
    except Exception as error:
        wrong, errors = " ".join(f"{type(error).__name__}: {error}".split()), ""
    seconds = time.monotonic() - begin
    print(f"{'WRONG: ' + wrong if wrong else 'ok'} {errors} {seconds:.2f} s", flush=True)
    records.write(name=problem.name, result="failed" if wrong else "passed", errors=errors, seconds=round(seconds, 2))
    return not wrong


def run(problem: Problem, device: str) -> tuple[str, str]:
    problem.results(getattr(haste_ext, problem.operation), problem.operands(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return "", ""


def check(problem: Problem, device: str) -> tuple[str, str]:
    """What is wrong, or nothing; and every result's error over what is allowed."""
    operands = problem.operands(device)
    ours, definition = getattr(haste_ext, problem.operation), getattr(reference, problem.operation)
    first, again = (problem.results(ours, operands) for _ in range(2))
    exact = problem.results(definition, problem.in_type(operands, torch.float64))
    widest = torch.promote_types(operands[0].dtype, operands[-1].dtype)
    eager = problem.results(definition, problem.in_type(operands, widest))
    largest = max(1.0, *(x.abs().max().item() for x in operands))
    names = ["value", *("dq" if i == 0 else "dk" for i in problem.differentiable)]
    wrong, errors = [], []
    for name, out, twice, eager_out, value in zip(names, first, again, eager, exact, strict=True):
        accuracy = measure_accuracy(out, eager_out, value, largest)
        errors.append(f"{name} {accuracy.error / max(accuracy.allowed, 1e-300):.2f}")
        if out.shape != value.shape:
            wrong.append(f"{name} has shape {tuple(out.shape)}, must be {tuple(value.shape)}")
        elif not accuracy.error <= LENIENCE * accuracy.allowed:
            wrong.append(f"{name} is off by {accuracy.error:.2e}, allowed {accuracy.allowed:.2e}")
        if not torch.equal(out, twice):
            wrong.append(f"{name} differs from run to run")
    return "; ".join(wrong), ", ".join(errors)


if __name__ == "__main__":
    sys.exit(main())
