"""Seconds, FLOPs and memory of whole sampling runs: plain, fewer steps, eager TaylorSeer, and every cache of haste.

    python benchmarks/sampling/run.py                                  SiT-B/2 and the digits' model on the CPU
    python benchmarks/sampling/run.py --device cuda --output FOLDER    SiT-XL/2 on a GPU, also with CUDA graphs
    python benchmarks/sampling/run.py --draw-only --output FOLDER      the table and the plot from results.json alone

All variants are measured in one run, taking turns, on one model with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from cases import GEOMETRIES, Case, make_case
from haste.errors import UserError
from haste.training.checkpoint import write_atomically
from plot import draw
from report import report, section
from rounds import measure
from variants import COMPILED, GRAPHS, LAUNCHED

HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 3, "cuda": 5}
MODELS = {"cpu": ["SiT-B/2", "digits"], "cuda": ["SiT-XL/2"]}
CUDA_BATCHES = [1, 8, 64]


@dataclass
class Args:
    """What to measure and where to write it."""

    model: list[str] | None = None
    """Of: SiT-B/2, SiT-XL/2, digits, tiny. Default: SiT-B/2 and digits on the CPU, SiT-XL/2 on a GPU."""
    resolution: int | None = None
    """Pixels per side. Default: 256, and 8 for the digits."""
    batch_size: list[int] | None = None
    """Pictures per run. Default: 1, and 100 digits, on the CPU; 1, 8 and 64 on a GPU."""
    dtype: str | None = None
    """Of the model: float32, bfloat16. Default: float32 on the CPU, bfloat16 on a GPU."""
    device: str = "cpu"
    """cpu or cuda."""
    num_steps: int = 50
    """Steps from noise to picture, by Euler."""
    interval: int = 4
    """One full step in so many, for every cache."""
    order: int = 4
    """Of TaylorSeer's forecast."""
    compiled: bool = False
    """Also everything under torch.compile, which takes minutes for a large model."""
    rounds: int | None = None
    """How often every run has its turn. Default: 3 on the CPU, 5 on a GPU."""
    threads: int | None = None
    """Of the CPU. Default: torch's choice."""
    output: Path | None = None
    """Folder of results.json, results.md and results.png; cases of earlier runs stay there, the same case is replaced.
    Default: the folder named after the device, beside this script."""
    draw_only: bool = False
    """Measure nothing: draw the table and the plot from results.json."""


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
    write_atomically(folder / "results.md", lambda temporary: temporary.write_text(report(document)))
    draw(document, folder / "results.png")
    if args.draw_only:
        print(report(document))
    print(f"wrote {folder}/results.json, results.md and results.png")


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
    write_atomically(folder / "results.json", lambda temporary: temporary.write_text(text))


def read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be a file that this script wrote") from error


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
