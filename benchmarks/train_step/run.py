"""Time and peak memory of one training step: vanilla, REPA, HASTE, HASTE after τ, eager code that writes its maps.

    python benchmarks/train_step/run.py                                  SiT-B/2 and SiT-XL/2 on the CPU, 256 tokens
    python benchmarks/train_step/run.py --device cuda --output FOLDER    on a GPU, at the paper's batch per device
    python benchmarks/train_step/run.py --plot-only --output FOLDER      the table and the plot from results.json alone

All variants are measured in one run, taking turns. What a teacher would say is handed in as random numbers in the
shapes of DINOv2-B's, so that alignment itself is timed; one row runs a DINOv2-B with random weights as well. Nothing
is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from cases import GEOMETRIES, Case, make_case
from haste.errors import UserError
from report import report, section
from rounds import measure
from transformers.utils.logging import disable_progress_bar
from variants import HASTE, VANILLA, VARIANTS, Variant

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import CommonArgs, import_plot, make_parser, run_script  # noqa: E402

PLOT = import_plot()
HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 5, "cuda": 10}


@dataclass
class Args(CommonArgs):
    """What to measure and where to write it; `parse` says of each what it is."""

    model: list[str] = field(default_factory=lambda: ["SiT-B/2", "SiT-XL/2"])
    resolution: list[int] = field(default_factory=lambda: [256])
    precision: list[str] | None = None
    batch_size: int | None = None
    variants: list[str] | None = None


def parse(arguments: Sequence[str] | None = None) -> Args:
    """The command line, by argparse: a borrowed machine may lack tyro."""
    parser = make_parser(__doc__, ROUNDS)
    add = parser.add_argument
    add("--model", nargs="+", help=f"Of: {', '.join(GEOMETRIES)}")
    add("--resolution", nargs="+", type=int, help="Pixels per side: 256 for 256 tokens, 512 for 1,024")
    add("--precision", nargs="+", help="Autocast: no, bf16. Default: no on the CPU, bf16 on a GPU")
    add("--batch-size", type=int, help="Images per step. Default: on the CPU 2 for SiT-B/2, else 1; 32 on a GPU")
    add("--variants", nargs="+", help="Rows of the table beside vanilla and HASTE. Default: all")
    return Args(**vars(parser.parse_args(arguments)))


def main(args: Args) -> None:
    args.check()
    disable_progress_bar()
    variants = wanted_variants(args.variants)
    measured = (measure(case, args.rounds or ROUNDS[args.device], variants) for case in wanted_cases(args))
    run_script(args, HERE, measured, section, report, PLOT)


def wanted_variants(names: Sequence[str] | None) -> list[Variant]:
    known = {variant.name: variant for variant in VARIANTS}
    for name in names or ():
        if name not in known:
            raise UserError(f"--variants must be of {', '.join(known)}, got {name!r}")
    wanted = {VANILLA.name, HASTE.name, *(known if names is None else names)}
    return [variant for name, variant in known.items() if name in wanted]


def wanted_cases(args: Args) -> list[Case]:
    precisions = args.precision or ["bf16" if args.device == "cuda" else "no"]
    return [
        make_case(model, resolution, args.batch_size, precision, args.device)
        for model, resolution, precision in product(args.model, args.resolution, precisions)
    ]


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
