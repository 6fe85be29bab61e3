"""Seconds, FLOPs and memory of sampling from xAR, beside the loop as it is published.

    python benchmarks/xar_sampling/run.py                                  xAR-B, batch 1 and 8, on the CPU
    python benchmarks/xar_sampling/run.py --batch-size 1 --rounds 2 --add  two more rounds of a case measured before
    python benchmarks/xar_sampling/run.py --plot-only --output FOLDER      table and plot from results.json alone

All runs are measured together, taking turns, on one model with random weights and with the same random numbers; haste's
images must be those of the published loop, to 1e-5 in float32. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import make_case
from haste.errors import UserError
from report import report, section
from rounds import join_rounds, measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import CommonArgs, import_plot, make_parser, read_results, run_script  # noqa: E402

PLOT = import_plot()
HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 3, "cuda": 3}
BATCHES = [1, 8]
STEPS = {1: 12, 8: 8}  # a cell; the paper's are 40, which take 4 and 50 minutes a round on two cores


@dataclass
class Args(CommonArgs):
    """What to measure and where to write it; `parse` says of each what it is."""

    model: str = "xAR-B"
    batch_size: list[int] | None = None
    dtype: str = "float32"
    num_steps: int | None = None
    cfg_scale: float = 2.7
    interval: int = 4
    order: int = 1
    stagger: int | None = None
    only: list[str] | None = None
    add: bool = False


def parse(arguments: Sequence[str] | None = None) -> Args:
    """The command line, by argparse: a borrowed machine may lack tyro."""
    parser = make_parser(__doc__, ROUNDS)
    add = parser.add_argument
    add("--model", help="xAR-B, xAR-L, xAR-H")
    add("--batch-size", nargs="+", type=int, help="Images per run. Default: 1 and 8")
    add("--dtype", help="Of the model: float32, bfloat16")
    add("--num-steps", type=int, help="Of each cell, by Euler–Maruyama. Default: 12 for one image, else 8")
    add("--cfg-scale", type=float, help="Guidance of the last cell")
    add("--interval", type=int, help="One full step in so many, where steps are forecast")
    add("--order", type=int, help="Of the forecast")
    add("--stagger", type=int, help="Steps between cells where they are staggered. Default: a quarter of their number")
    add("--only", nargs="+", help="Rows of the table to measure beside the published loop. Default: all")
    add("--add", action="store_true", help="Add the rounds to those of the same case in results.json")
    return Args(**vars(parser.parse_args(arguments)))


def main(args: Args) -> None:
    args.check()
    if args.device != "cpu":
        raise UserError(f"--device must be cpu, got {args.device}: the runs are not yet measured on a GPU")
    run_script(args, HERE, measured(args), section, report, PLOT)


def measured(args: Args) -> Iterator[dict[str, Any]]:
    for batch in args.batch_size or BATCHES:
        steps = args.num_steps or STEPS.get(batch, STEPS[8])
        stagger = args.stagger or max(steps // 4, 1)
        case = make_case(args.model, batch, args.dtype, steps, args.cfg_scale, args.interval, args.order, stagger)
        result = measure(case, args.rounds or ROUNDS["cpu"], args.only or ())
        if args.add:
            old = read_results(args.output or HERE / args.device)["results"]
            same = [other for other in old if other["case"] == result["case"]]
            result = join_rounds(same[0], result) if same else result
        yield result


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
