"""Seconds, FLOPs and memory of whole sampling runs: plain, fewer steps, eager TaylorSeer, and every cache of haste.

    python benchmarks/sampling/run.py                                  SiT-B/2 and the digits' model on the CPU
    python benchmarks/sampling/run.py --device cuda --output FOLDER    SiT-XL/2 on a GPU, also with CUDA graphs
    python benchmarks/sampling/run.py --draw-only --output FOLDER      the table and the plot from results.json alone

All variants are measured in one run, taking turns, on one model with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import GEOMETRIES, Case, make_case
from haste.errors import UserError
from haste.io import write_text
from report import report, section
from rounds import measure
from variants import COMPILED, GRAPHS, LAUNCHED

try:
    from plot import draw
except ModuleNotFoundError as error:
    draw, MISSING_FOR_PLOT = None, error.name

HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 3, "cuda": 5}
MODELS = {"cpu": ["SiT-B/2", "digits"], "cuda": ["SiT-XL/2"]}
CUDA_BATCHES = [1, 8, 64]


@dataclass
class Args:
    """What to measure and where to write it; `parse` says of each what it is."""

    model: list[str] | None = None
    resolution: int | None = None
    batch_size: list[int] | None = None
    dtype: str | None = None
    device: str = "cpu"
    num_steps: int = 50
    interval: int = 4
    order: int = 4
    compiled: bool = False
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
    add("--model", nargs="+", help="Of: SiT-B/2, SiT-XL/2, digits, tiny. Default: SiT-B/2 and digits on the CPU, "
        "SiT-XL/2 on a GPU")  # fmt: skip
    add("--resolution", type=int, help="Pixels per side. Default: 256, and 8 for the digits")
    add("--batch-size", nargs="+", type=int, help="Images per run. Default: on the CPU 1, and 100 digits; on a GPU "
        "1, 8 and 64")  # fmt: skip
    add("--dtype", help="Of the model: float32, bfloat16. Default: float32 on the CPU, bfloat16 on a GPU")
    add("--device", help="cpu or cuda")
    add("--num-steps", type=int, help="Steps from noise to image, by Euler")
    add("--interval", type=int, help="One full step in so many, for every cache")
    add("--order", type=int, help="Of TaylorSeer's forecast")
    add("--compiled", action="store_true", help="Also everything under torch.compile, which takes minutes for a large "
        "model")  # fmt: skip
    add("--rounds", type=int, help="How often every run has its turn. Default: 3 on the CPU, 5 on a GPU")
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
        for case in wanted_cases(args):
            result = measure(case, args.rounds or ROUNDS[args.device], launches(args))
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
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    settings = (dtype, args.device, args.num_steps, args.interval, args.order)
    return [
        make_case(model, args.resolution, batch, *settings)
        for model in args.model or MODELS[args.device]
        for batch in args.batch_size or default_batches(model, args.device)
    ]


def launches(args: Args) -> list[str]:
    wanted = {LAUNCHED: True, GRAPHS: args.device == "cuda", COMPILED: args.compiled}
    return [launch for launch, yes in wanted.items() if yes]


def default_batches(model: str, device: str) -> list[int]:
    if device == "cuda":
        return CUDA_BATCHES
    return [GEOMETRIES[model].cpu_batch] if model in GEOMETRIES else [1]


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
