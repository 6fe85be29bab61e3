"""Seconds, FLOPs and memory of whole sampling runs: uncached, fewer steps, eager TaylorSeer, and every cache of haste.

    python benchmarks/sampling/run.py                                  SiT-B/2 and the digits' model on the CPU
    python benchmarks/sampling/run.py --device cuda --output FOLDER    SiT-XL/2 on a GPU, also with CUDA graphs
    python benchmarks/sampling/run.py --plot-only --output FOLDER      the table and the plot from results.json alone

All variants are measured in one run, taking turns, on one model with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import GEOMETRIES, Case, make_case
from haste.errors import UserError
from report import report, section
from rounds import measure
from variants import COMPILED, GRAPHS, LAUNCHED

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import CommonArgs, import_plot, make_parser, run_script  # noqa: E402

PLOT = import_plot()
HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 3, "cuda": 5}
MODELS = {"cpu": ["SiT-B/2", "digits"], "cuda": ["SiT-XL/2"]}
CUDA_BATCHES = [1, 8, 64]


@dataclass
class Args(CommonArgs):
    """What to measure and where to write it; `parse` says of each what it is."""

    model: list[str] | None = None
    resolution: int | None = None
    batch_size: list[int] | None = None
    dtype: str | None = None
    num_steps: int = 50
    interval: int = 4
    order: int = 4
    compiled: bool = False
    processor_time: bool = False


def parse(arguments: Sequence[str] | None = None) -> Args:
    """The command line, by argparse: a borrowed machine may lack tyro."""
    parser = make_parser(__doc__, ROUNDS)
    add = parser.add_argument
    add("--model", nargs="+", help=f"Of: {', '.join(GEOMETRIES)}. Default: SiT-B/2 and digits on the CPU, "
        "SiT-XL/2 on a GPU")  # fmt: skip
    add("--resolution", type=int, help="Pixels per side. Default: 256, and 8 for the digits")
    add("--batch-size", nargs="+", type=int, help="Images per run. Default: on the CPU 1, and 100 digits; on a GPU "
        "1, 8 and 64")  # fmt: skip
    add("--dtype", help="Of the model: float32, bfloat16. Default: float32 on the CPU, bfloat16 on a GPU")
    add("--num-steps", type=int, help="Steps from noise to image, by Euler, of DiT by DDIM")
    add("--interval", type=int, help="One full step in so many, for every cache")
    add("--order", type=int, help="Of TaylorSeer's forecast")
    add("--compiled", action="store_true", help="Also everything under torch.compile, which takes minutes for a large "
        "model")  # fmt: skip
    add("--processor-time", action="store_true", help="Seconds of the processor in one thread, for a machine that "
        "others share")  # fmt: skip
    return Args(**vars(parser.parse_args(arguments)))


def main(args: Args) -> None:
    args.check()
    if args.processor_time:
        if args.device != "cpu" or args.threads not in (None, 1):
            raise UserError(f"--processor-time must come with --device cpu and --threads 1, got {args.device} and "
                            f"{args.threads}")  # fmt: skip
        args.threads = 1
    measured = (measure(case, args.rounds or ROUNDS[args.device], launches(args)) for case in wanted_cases(args))
    run_script(args, HERE, measured, section, report, PLOT)


def wanted_cases(args: Args) -> list[Case]:
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    settings = (dtype, args.device, args.num_steps, args.interval, args.order, args.processor_time)
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


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
