"""python -m haste_ext.bench: verifies the operations against float64, then times them beside the other ways.

python -m haste_ext.bench --op attn_align_loss --tokens 256 1024 --output attn_align_loss.json
python -m haste_ext.bench plot attn_align_loss.json
python -m haste_ext.bench host
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import haste_ext
from haste_ext.bench import report
from haste_ext.bench.compare import compare, compare_on_host
from haste_ext.bench.measure import ENOUGH, TURNS, describe_machine, measure_roofline
from haste_ext.bench.operations import OPERATIONS, Case, Operation

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
HOST_DESCRIPTION = """\
What a call costs the host, whatever its size: each loss on tiny tensors, beside a torch.autograd.Function that does
nothing.
"""
LOSSES = [name for name, op in OPERATIONS.items() if len(op.results) > 1]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("table", "plot"):
        return show(argv)
    if argv and argv[0] == "host":
        return run_host(argv[1:])
    return run(parse_arguments(argv))


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes case by case, so that a run that breaks off leaves what it has. 1 if ours failed."""
    torch.set_num_threads(args.threads)
    common = {
        "machine": describe_machine(args.device),
        "settings": {"min_seconds": args.min_seconds, "turns": TURNS, "turns_if_slow": ENOUGH},
        "roofline": measure_roofline(args.device, [getattr(torch, name) for name in args.dtype]),
    }
    print(report.headline({**common, "results": []}), flush=True)
    status = 0
    by_file: dict[Path, list[dict]] = {}
    for op in (OPERATIONS[name] for name in args.op):
        for case in cases_of(op, args):
            result = compare(op, case, args.forward_only, args.min_seconds, common["roofline"])
            print(f"\n{report.case_table(result)}", flush=True)
            status |= any(row.get("failed", False) for row in result["rows"])
            if args.output:
                path = args.output if args.output.suffix else args.output / f"{op.name}.json"
                by_file.setdefault(path, []).append(result)
                write(path, {**common, "results": by_file[path]})
    print(f"\n{report.footer(common)}")
    for path in by_file:
        print(f"wrote {path}")
    return int(status)


def run_host(argv: Sequence[str]) -> int:
    """What each loss costs the host, beside a Function that does nothing."""
    parser = build_host_parser()
    args = check_device(parser, argv)
    check_output(parser, args.output, "end in .json")
    torch.set_num_threads(args.threads)
    document = {
        "machine": describe_machine(args.device),
        "settings": {"min_seconds": args.min_seconds},
        "roofline": None,
        "results": [compare_on_host(OPERATIONS[name], args.device, args.min_seconds) for name in args.op],
    }
    print(report.host_table(document))
    if args.output:
        write(args.output, document)
        print(f"wrote {args.output}")
    return 0


def show(argv: Sequence[str]) -> int:
    """The tables or the plots of runs, from their JSON alone."""
    parser = argparse.ArgumentParser(prog=f"python -m haste_ext.bench {argv[0]}")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    if argv[0] == "plot":
        parser.add_argument("--output", type=Path, help="folder of the images; default: beside the file")
    args = parser.parse_args(argv[1:])
    for path in args.files:
        document = read(path, parser)
        if argv[0] == "table":
            print(report.table(document))
            continue
        try:
            from haste_ext.bench.plot import plot_document  # only plots need matplotlib
        except ModuleNotFoundError as error:
            parser.error(f"plot needs {error.name}: run `pip install {error.name}`")
        folder = args.output or path.parent
        try:
            check_folder(folder)
        except OSError as error:
            parser.error(f"--output must be a folder that can be written to, got {folder} ({error.strerror})")
        for image in plot_document(document, folder, path.stem):
            print(f"wrote {image}")
    return 0


def write(path: Path, document: dict) -> None:
    """Whole or not at all: it is written anew after every case, and a kill spares what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, parser: argparse.ArgumentParser) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        parser.error(f"FILE.json must be a file that --output wrote, got {path}, which is no JSON ({error})")
    if not isinstance(document, dict) or not {"machine", "settings", "roofline", "results"} <= document.keys():
        parser.error(f"FILE.json must be a file that --output wrote, got {path}, which holds no results")
    if not report.can_show(document):
        parser.error(f"FILE.json must hold operations beside other ways of writing them, got {path}")
    return document


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


def build_host_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m haste_ext.bench host", description=HOST_DESCRIPTION)
    parser.add_argument("--op", nargs="+", choices=LOSSES, default=LOSSES, metavar="OP",
                        help=f"of {', '.join(LOSSES)}; default: all")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=whole_number, metavar="N", default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--min-seconds", type=positive, metavar="S", default=2.0, help="per contender; default: 2")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write JSON")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = check_device(parser, argv)
    if args.device == "cuda" and "float64" in args.dtype:
        parser.error("--dtype must be float32, bfloat16 or float16 on cuda, got float64")
    if args.batch and len(args.batch) not in (1, len(args.tokens)):
        parser.error(f"--batch must be one number, or one for each of the {len(args.tokens)} of --tokens, got "
                     f"{len(args.batch)}")  # fmt: skip
    check_output(parser, args.output, "end in .json or name a folder")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_device(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check that --device is available."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu, got cuda: torch finds no CUDA device here")
    if args.device == "cuda" and not haste_ext.build_info()["cuda"]:
        parser.error("--device must be cpu, got cuda: this build of haste_ext holds no CUDA kernels")
    return args


def check_output(parser: argparse.ArgumentParser, output: Path | None, must: str) -> None:
    """Refuses, before anything is measured, an --output that is not what it `must` be or cannot be written.

    Makes the folder that is to hold it.
    """
    if output is None:
        return
    if output.suffix != ".json" and (output.suffix or "folder" not in must):
        parser.error(f"--output must {must}, got {output}")
    try:
        check_folder(output.parent if output.suffix else output)
        if output.suffix:
            with output.open("ab") as file:
                empty = file.tell() == 0
            if empty:
                output.unlink()
            elif not is_document(output):
                parser.error(f"--output must be a new file or one of results, got {output}, which holds something else")
    except OSError as error:
        parser.error(f"--output must {must}, got {output}, which cannot be written ({error.strerror})")


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
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
