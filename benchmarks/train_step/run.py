"""Time and peak memory of one training step: plain SiT, REPA, HASTE, HASTE after τ, eager code that writes its maps.

    python benchmarks/train_step/run.py                                  SiT-B/2 and SiT-XL/2 on the CPU, 256 tokens
    python benchmarks/train_step/run.py --device cuda --output FOLDER    on a GPU, at the paper's batch per device
    python benchmarks/train_step/run.py --draw-only --output FOLDER      the table and the plot from results.json alone

All variants are measured in one run, taking turns. What a teacher would say is handed in as random numbers in the
shapes of DINOv2-B's, so that alignment itself is timed; one row runs a DINOv2-B with random weights as well. Nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import Case, make_case
from haste.errors import UserError
from haste.io import write_text
from report import report, section
from rounds import measure
from transformers.utils.logging import disable_progress_bar

try:
    from plot import draw
except ModuleNotFoundError as error:
    draw, MISSING_FOR_PLOT = None, error.name

HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 5, "cuda": 10}


@dataclass
class Args:
    """What to measure and where to write it; `parse` says of each what it is."""

    model: list[str] = field(default_factory=lambda: ["SiT-B/2", "SiT-XL/2"])
    resolution: list[int] = field(default_factory=lambda: [256])
    precision: list[str] | None = None
    batch_size: int | None = None
    device: str = "cpu"
    rounds: int | None = None
    threads: int | None = None
    output: Path | None = None
    draw_only: bool = False


def parse(arguments: Sequence[str] | None = None) -> Args:
    """The command line, by argparse: a borrowed machine may lack tyro."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--model", nargs="+", help="Of: SiT-B/2, SiT-L/2, SiT-XL/2, tiny")
    add("--resolution", nargs="+", type=int, help="Pixels per side: 256 for 256 tokens, 512 for 1,024")
    add("--precision", nargs="+", help="Autocast: no, bf16. Default: no on the CPU, bf16 on a GPU")
    add("--batch-size", type=int, help="Images per step. Default: on the CPU 2 for SiT-B/2, else 1; 32 on a GPU")
    add("--device", help="cpu or cuda")
    add("--rounds", type=int, help="How often every variant has its turn. Default: 5 on the CPU, 10 on a GPU")
    add("--threads", type=int, help="Of the CPU. Default: torch's choice")
    add("--output", type=Path, help="Folder of results.json, results.md and results.png; cases of earlier runs stay "
        "there, the same case is replaced. Default: the folder named after the device, beside this script")  # fmt: skip
    add("--draw-only", action="store_true", help="Measure nothing: draw the table and the plot from results.json")
    return Args(**vars(parser.parse_args(arguments)))


def main(args: Args) -> None:
    check(args)
    folder = args.output or HERE / args.device
    if not args.draw_only:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        disable_progress_bar()
        for case in wanted_cases(args):
            result = measure(case, args.rounds or ROUNDS[args.device])
            print(f"{section(result)}\n", flush=True)
            keep(folder, result)
    document = read(folder)
    write_text(folder / "results.md", report(document))
    drawn = draw_if_possible(document, folder / "results.png")
    if args.draw_only:
        print(report(document))
    print(f"wrote {folder}/results.json, results.md{' and results.png' if drawn else ''}")


def draw_if_possible(document: dict[str, Any], path: Path) -> bool:
    """A machine without matplotlib measures all the same."""
    if draw is None:
        print(f"no {path.name}, as {MISSING_FOR_PLOT} is not installed here; --draw-only makes it elsewhere")
        return False
    draw(document, path)
    return True


def check(args: Args) -> None:
    """UserError, in one sentence, for settings that cannot work."""
    if args.device not in ROUNDS:
        raise UserError(f"--device is {args.device!r}; it must be one of {', '.join(ROUNDS)}")
    if args.device == "cuda" and not (args.draw_only or torch.cuda.is_available()):
        raise UserError("--device is cuda, and torch finds no CUDA device here; it must be cpu")
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")


def wanted_cases(args: Args) -> list[Case]:
    precisions = args.precision or ["bf16" if args.device == "cuda" else "no"]
    return [
        make_case(model, resolution, args.batch_size, precision, args.device)
        for model, resolution, precision in product(args.model, args.resolution, precisions)
    ]


def keep(folder: Path, result: dict[str, Any]) -> None:
    """Add one case to results.json, in place of the same one measured before."""
    folder.mkdir(parents=True, exist_ok=True)
    results = read(folder)["results"] if (folder / "results.json").is_file() else []
    places = [place for place, other in enumerate(results) if other["case"] == result["case"]] or [len(results)]
    results[places[0] : places[0] + 1] = [result]
    text = json.dumps({"results": results}, indent=1, ensure_ascii=False) + "\n"
    write_text(folder / "results.json", text)


def read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be a file that this script wrote") from error


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
