"""The command line of the benchmark: what to measure, and nothing that cannot be."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import haste_ext
from haste_ext.bench import (
    attn_align_loss,
    taylor_extrapolate,
    taylor_extrapolate_blocks,
    taylor_extrapolate_steps,
    token_cosine_loss,
)
from haste_ext.bench.operation import Case, Operation

OPERATIONS: dict[str, Operation] = {
    module.OPERATION.name: module.OPERATION
    for module in (
        attn_align_loss, token_cosine_loss, taylor_extrapolate, taylor_extrapolate_blocks, taylor_extrapolate_steps,
    )
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")


def preset(depth: int, width: int, heads: int) -> dict[str, int]:
    """A SiT beside DINOv2-B, whose 12 heads of 64 and 768 features it is aligned to."""
    return {
        "heads": min(heads, 12), "student_dim": width // heads, "teacher_dim": 64,
        "feature_dim": 768, "width": width, "layers": 2 * depth, "order": 4, "steps": 3,
    }  # fmt: skip


PRESETS = {
    "sit-s": preset(12, 384, 6),
    "sit-b": preset(12, 768, 12),
    "sit-l": preset(24, 1024, 16),
    "sit-xl": preset(28, 1152, 16),
}
DESCRIPTION = """\
Every operation is first verified against float64, then timed beside the other ways of writing it: eager code, that code
under torch.compile, compositions of torch's kernels. Then there are

  python -m haste_ext.bench table FILE.json ...                    the tables of a run, from its JSON
  python -m haste_ext.bench plot FILE.json ... [--output FOLDER]   its plots: time, memory, share of the roofline over N
  python -m haste_ext.bench host                                   what a call costs the host, whatever its size
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m haste_ext.bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OP",
                        help=f"of {', '.join(OPERATIONS)}; default: all")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="TYPE",
                        help=f"of {', '.join(DTYPES)}; default: float32 bfloat16")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--forward-only", action="store_true", help="losses without their gradients")

    shape = parser.add_argument_group("shape", "dimensions that are not given are those of the preset")
    shape.add_argument("--preset", choices=PRESETS, default="sit-xl", help="default: sit-xl")
    shape.add_argument(
        "--tokens", type=whole_number, metavar="N", nargs="+", default=[256, 1024], help="default: 256 1024"
    )
    batches = ", ".join(f"{op.default_batch} ({name})" for name, op in OPERATIONS.items())
    shape.add_argument("--batch", type=whole_number, metavar="N", nargs="+",
                       help=f"one for all, or one for each of --tokens; default: {batches}")  # fmt: skip
    shape.add_argument("--heads", type=whole_number, metavar="N", help="aligned heads (attn_align_loss)")
    shape.add_argument(
        "--student-dim", type=whole_number, metavar="N", help="the student's head dimension (attn_align_loss)"
    )
    shape.add_argument(
        "--teacher-dim", type=whole_number, metavar="N", help="the teacher's head dimension (attn_align_loss)"
    )
    shape.add_argument(
        "--feature-dim", type=whole_number, metavar="N", help="width of the teacher's tokens (token_cosine_loss)"
    )
    shape.add_argument("--width", type=whole_number, metavar="N", help="of the SiT (taylor_...)")
    shape.add_argument(
        "--order", type=whole_number, metavar="N", help="of the forecast: order + 1 snapshots (taylor_...)"
    )
    shape.add_argument("--layers", type=whole_number, metavar="N", help="cached modules (taylor_..._blocks, _steps)")
    shape.add_argument("--steps", type=whole_number, metavar="N", help="skipped in a row (taylor_extrapolate_steps)")

    parser.add_argument("--threads", type=whole_number, metavar="N", default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--min-seconds", type=positive, metavar="S", default=2.0, help="per contender, at the least; default: 2"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="write JSON: a .json file, or a folder that gets one per operation"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = check_device(parser, argv)
    if args.device == "cuda" and "float64" in args.dtype:
        parser.error("--dtype is float64; on cuda it must be float32, bfloat16 or float16")
    if args.batch and len(args.batch) not in (1, len(args.tokens)):
        parser.error(f"--batch has {len(args.batch)} values; it must have one, or one for each of the "
                     f"{len(args.tokens)} of --tokens")  # fmt: skip
    check_output(parser, args.output, "end in .json or name a folder")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_device(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed flags, where --device is to be had."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; torch finds no CUDA device here, so it must be cpu")
    if args.device == "cuda" and not haste_ext.build_info()["cuda"]:
        parser.error("--device is cuda; this build of haste_ext holds no CUDA kernels, so it must be cpu")
    return args


def check_output(parser: argparse.ArgumentParser, output: Path | None, must: str) -> None:
    """Refuses, before anything is measured, an --output that is not what it `must` be or cannot be written.

    Makes the folder that is to hold it.
    """
    if output is None:
        return
    if output.suffix != ".json" and (output.suffix or "folder" not in must):
        parser.error(f"--output is {output}; it must {must}")
    try:
        check_folder(output.parent if output.suffix else output)
        if output.suffix:
            with output.open("ab") as file:
                empty = file.tell() == 0
            if empty:
                output.unlink()
            elif not is_document(output):
                parser.error(f"--output is {output}, which holds something else than results; it must be a new file")
    except OSError as error:
        parser.error(f"--output is {output}, which cannot be written ({error.strerror}); it must {must}")


def is_document(path: Path) -> bool:
    """Whether a file is one that --output has written."""
    try:
        return "results" in json.loads(path.read_text())
    except (ValueError, TypeError):
        return False


def check_folder(folder: Path) -> None:
    """Makes it; OSError where nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def cases_of(op: Operation, args: argparse.Namespace) -> list[Case]:
    """By type, then by tokens."""
    batches = args.batch or [op.default_batch]
    if len(batches) == 1:
        batches = batches * len(args.tokens)
    own = {name: getattr(args, name) for name in op.case.own_fields()}
    return [
        op.case(batch, tokens, getattr(torch, dtype), args.device, **own)
        for dtype in args.dtype
        for batch, tokens in zip(batches, args.tokens, strict=True)
    ]


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}; it must be a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {text}; it must be a positive number")
    return value
