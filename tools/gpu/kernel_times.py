"""Time of each kernel of attn_align_loss alone, by replays of CUDA graphs over inputs that exceed the L2 several times.

    kernel_times.py [--output FILE.json] [--tokens N ...]

At 65,536 tokens of SiT-XL/2's aligned heads beside DINOv2-B's. floor: the least time that the measured rates of copies,
products and exponentials allow. HASTE_CUDA_KERNELS chooses between the portable kernels and Hopper's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import haste_ext  # noqa: F401  (registers the operations)
from haste_ext.bench.compare import floor_seconds, rotations
from haste_ext.bench.measure import GpuTimer, measure_roofline
from haste_ext.bench.operations import AttentionCase

DEVICE = "cuda"
TOKENS = 65_536
HEADS, STUDENT_DIM, TEACHER_DIM = 12, 72, 64
SETTINGS = (None, None, 0, 0)  # scales and prefixes
SECONDS = 0.2  # of replays
OPERATIONS = torch.ops.haste


class Inputs:
    """One set: operands, what the forward saves, and a gradient of the output, given in full or as one number."""

    def __init__(self, case: AttentionCase) -> None:
        self.operands = case.inputs()
        self.loss, *self.saved = OPERATIONS.attn_align_loss_forward(*self.operands, *SETTINGS)
        self.full = torch.full_like(self.loss, 1 / self.loss.numel())
        self.one = self.full[:1, :1, :1].clone().expand_as(self.loss)

    def forward(self) -> object:
        return OPERATIONS.attn_align_loss_forward(*self.operands, *SETTINGS)

    def backward(self, grad_out: torch.Tensor, need_q: bool = True, need_k: bool = True) -> object:
        return OPERATIONS.attn_align_loss_backward(grad_out, *self.operands, *self.saved, *SETTINGS, need_q, need_k)


# At most 256 tokens Hopper's dq and dk come from one kernel, the joint one; beyond, from one each.
KERNELS: dict[str, Callable[[Inputs], object]] = {
    "forward": Inputs.forward,
    "backward": lambda x: x.backward(x.one),
    "backward, grad_out per row": lambda x: x.backward(x.full),
    "dq alone": lambda x: x.backward(x.one, need_k=False),
    "dk alone": lambda x: x.backward(x.one, need_q=False),
    "mean": lambda x: x.loss.mean(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], metavar="N")
    arguments = parser.parse_args()
    roofline = measure_roofline(DEVICE, [torch.bfloat16])
    rate = roofline["matmul_flops_per_second"]["bfloat16"]
    print(
        f"copy {roofline['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 products {rate / 1e12:.0f} TFLOP/s", flush=True
    )
    rows: list[dict] = []
    for tokens in arguments.tokens:
        rows += measure(tokens, roofline)
        if arguments.output:  # after each, as what follows may not end
            arguments.output.write_text(json.dumps({"roofline": roofline, "rows": rows}, indent=1))
    return 0


def measure(tokens: int, roofline: dict) -> list[dict]:
    case = AttentionCase(max(1, TOKENS // tokens), tokens, torch.bfloat16, DEVICE, HEADS, STUDENT_DIM, TEACHER_DIM)
    sets = [Inputs(case) for _ in range(rotations(case))]
    floors = [floor_seconds([phase], "bfloat16", roofline) for phase in case.phases()]
    rows = []
    for name, kernel in KERNELS.items():
        timer = GpuTimer([lambda x=x, kernel=kernel: kernel(x) for x in sets])
        row = {"tokens": tokens, "batch": case.batch, "kernel": name, "seconds": median(timer.times(SECONDS))}
        row |= {"host_seconds": median(timer.host_times()), "timed_by_events": timer.why_events}
        if name in ("forward", "backward"):
            row["floor_seconds"] = floors[name == "backward"]
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    text = f"N {row['tokens']:5d}  {row['kernel']:26s} {row['seconds'] * 1e6:8.1f} µs"
    if "floor_seconds" in row:
        text += f"  {row['floor_seconds'] / row['seconds']:4.0%} of the floor, {row['floor_seconds'] * 1e6:.1f} µs;"
    text += f"  host {row['host_seconds'] * 1e6:.0f} µs"
    return text + (f"  by events: {row['timed_by_events']}" if row["timed_by_events"] else "")


if __name__ == "__main__":
    sys.exit(main())
