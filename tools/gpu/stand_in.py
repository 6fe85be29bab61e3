"""Rehearsal: stand-ins for the stages' programs, which need no GPU and fail, hang or crash on request.

A stand-in leaves what its stage's program would: records of tests, a sanitizer's log, JSON. Told a fault, it does half
of it and then ends by that fault. All times are a twentieth of the real ones.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

SCALE = 1 / 20
RESULT = {"operation": "token_cosine_loss", "ratio": 1.0}
FAULTS = ("fails", "hangs", "crashes")
MACHINE = {
    "gpu": "a stand-in", "capability": "9.0", "torch": "none", "date": "2000-01-01", "sanitizer": "2025.3.1.0",
    "sanitizer_help": "--check-bulk-copy --check-warpgroup-mma",
}  # fmt: skip
OPERATIONS = {"shared": ("token_cosine_loss", "taylor_extrapolate_blocks")}  # else attn_align_loss


def rehearsed(plan: Sequence, faults: Mapping[str, str]) -> list:
    """Replace each program of the plan by a stand-in. Raises ValueError for an unknown fault or stage."""
    names = [stage.name for stage in plan]
    for name, fault in faults.items():
        if name not in names:
            raise ValueError(f"stages of --rehearse must be of {', '.join(names)}, got {name!r}")
        if fault not in FAULTS:
            raise ValueError(f"--rehearse must be STAGE=FAULT with a fault of {', '.join(FAULTS)}, got {name}={fault}")
    return [replace(stage, command=stand_in(stage, faults.get(stage.name, ""))) for stage in plan]


def stand_in(stage, fault: str):
    def command(run, groups: Sequence[str]) -> list[str]:
        output = str(stage.output_path(run)) if stage.output else ""
        kind = stage.kind if stage.name != "wgmma n72" else "program"
        return [sys.executable, "-S", str(Path(__file__).resolve()), kind, fault, output, *groups]

    return command


def main(kind: str, fault: str, output: str, *groups: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import records  # beside this file

    names = [f"{op} {i}" for group in groups for op in OPERATIONS.get(group, ("attn_align_loss",)) for i in range(4)]
    with_tests = kind in ("smoke", "correctness", "compile", "sanitizers")
    if with_tests:
        records.write(planned=names)
        for name in names[: len(names) // 2 if fault else None]:
            records.write(name=name, result="started")
            records.write(name=name, result="passed")
    if fault:
        if with_tests:
            records.write(name=names[len(names) // 2], result="started")
        return end_by(fault)
    if output:
        Path(output).write_text(contents(kind, groups))
    print(f"{kind} {' '.join(groups)} stood in, in {os.getcwd()}, with {os.environ.get('HASTE_CUDA_KERNELS')}")
    return 0


def end_by(fault: str) -> int:
    print(f"it {fault}", flush=True)
    if fault == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if fault == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 3


def contents(kind: str, groups: Sequence[str]) -> str:
    """Of the file that the stage's program writes."""
    if kind == "sanitizers":
        return "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    row = {
        "tokens": 256,
        "batch": 256,
        "kernel": "forward",
        "seconds": 1.0,
        "host_seconds": 1.0,
        "timed_by_events": None,
    }
    documents = {
        "probe": MACHINE,
        "build": {"cuda_kernels": ["portable", "hopper"]},
        "timing": {"roofline": {}, "rows": [row]},
        "benchmark": {"machine": {"commit": None}, "settings": {}, "roofline": {}, "results": [RESULT]},
    }
    return json.dumps(documents[kind])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
