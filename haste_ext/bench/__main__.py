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
from collections.abc import Sequence
from pathlib import Path

import torch

from haste_ext.bench import cli, report
from haste_ext.bench.compare import compare
from haste_ext.bench.machine import describe_machine
from haste_ext.bench.measure import ENOUGH, TURNS
from haste_ext.bench.roofline import measure_roofline


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("table", "plot"):
        return show(argv)
    if argv and argv[0] == "host":
        return time_host(argv[1:])
    return run(cli.parse_arguments(argv))


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
    for op in (cli.OPERATIONS[name] for name in args.op):
        for case in cli.cases_of(op, args):
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


def time_host(argv: Sequence[str]) -> int:
    """What each loss costs the host, beside a Function that does nothing."""
    from haste_ext.bench import host_time

    parser = host_time.build_parser()
    args = cli.check_device(parser, argv)
    cli.check_output(parser, args.output, "end in .json")
    document = host_time.run(args)
    print(host_time.table(document))
    if args.output:
        write(args.output, document)
        print(f"wrote {args.output}")
    return 0


def show(argv: Sequence[str]) -> int:
    """The tables or the plots of runs, from their JSON alone."""
    parser = argparse.ArgumentParser(prog=f"python -m haste_ext.bench {argv[0]}")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    if argv[0] == "plot":
        parser.add_argument("--output", type=Path, help="folder of the pictures; default: beside the file")
    args = parser.parse_args(argv[1:])
    for path in args.files:
        document = read(path, parser)
        if argv[0] == "table":
            print(report.table(document))
            continue
        from haste_ext.bench.plot import draw  # matplotlib is wanted here alone

        folder = args.output or path.parent
        try:
            cli.check_folder(folder)
        except OSError as error:
            parser.error(f"no picture can be written to {folder} ({error.strerror}); --output must name a folder")
        for picture in draw(document, folder, path.stem):
            print(f"wrote {picture}")
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
        parser.error(f"{path} cannot be read as JSON ({error}); it must be a file that --output wrote")
    if not isinstance(document, dict) or not {"machine", "settings", "roofline", "results"} <= document.keys():
        parser.error(f"{path} holds no results of this benchmark; it must be a file that --output wrote")
    if not report.can_show(document):
        parser.error(f"{path} holds no operations beside other ways; it must be one that --output wrote, not host's")
    return document


if __name__ == "__main__":
    sys.exit(main())
