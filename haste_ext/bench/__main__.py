"""python -m haste_ext.bench: verifies an operation against float64, then times it beside eager code.

python -m haste_ext.bench --tokens 256 1024 --dtype float32 bfloat16 --output attn_align_loss.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

import haste_ext
from haste_ext.bench import attn_align_loss as op
from haste_ext.bench.measure import peak_extra_bytes, time_call


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m haste_ext.bench",
        description="attn_align_loss, forward + backward: verified against float64, then timed beside "
        "eager code in the same run, with the peak of the extra memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--student-dim", type=int, default=72, help="the student's head dimension")
    parser.add_argument("--teacher-dim", type=int, default=64, help="the teacher's head dimension")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="how long each row is timed at the least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args()
    for name in args.dtype:
        if name not in ("float32", "float16", "bfloat16", "float64"):
            parser.error(f"--dtype is {name}; it must be float32, float16, bfloat16 or float64")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; torch finds no CUDA device here, so it must be cpu")
    return args


def measure(case: op.Case, min_seconds: float) -> dict[str, object]:
    accuracy = op.verify(case)
    rows = {}
    for name, loss in op.CONTENDERS.items():
        call = op.forward_backward(loss, case.operands())
        call()
        seconds = time_call(call, min_seconds, case.device)
        rows[name] = {**asdict(seconds), "peak_extra_bytes": peak_extra_bytes(call, case.device)}
    return {
        "case": {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")},
        "error_over_eager_error": accuracy,
        "rows": rows,
    }


def print_table(result: dict) -> None:
    case, rows = result["case"], result["rows"]
    shape = f"batch {case['batch']}, {case['heads']} heads, d {case['student_dim']}/{case['teacher_dim']}"
    print(f"\nattn_align_loss forward + backward, {shape}, N {case['tokens']}, {case['dtype']}")
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["error_over_eager_error"].items())
    print(f"  error over eager's error, against float64: {ratios}")
    base = rows[op.BASELINE]
    for name, row in rows.items():
        print(
            f"  {name:<20} {row['median'] * 1e3:9.2f} ms  [{row['p20'] * 1e3:.2f}, {row['p80'] * 1e3:.2f}]"
            f"  {base['median'] / row['median']:6.2f} x"
            f"   extra memory {row['peak_extra_bytes'] / 2**20:8.1f} MiB"
            f"  {row['peak_extra_bytes'] / base['peak_extra_bytes']:8.2%}"
        )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    info = haste_ext.build_info()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{info['cpu_path']}, {args.threads} threads"
    print(f"haste_ext {info['version']}, torch {info['torch_loaded']}, {where}")
    results = []
    for tokens, dtype in product(args.tokens, args.dtype):
        case = op.Case(
            args.batch, args.heads, tokens, args.student_dim, args.teacher_dim, getattr(torch, dtype), args.device
        )
        results.append(measure(case, args.min_seconds))
        print_table(results[-1])
    if args.output:
        document = {"build_info": info, "threads": args.threads, "device": where, "results": results}
        args.output.write_text(json.dumps(document, indent=1))
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
