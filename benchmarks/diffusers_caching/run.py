"""Speed, error and memory of caches around diffusers' transformers: haste's, diffusers' TaylorSeer, and cache-dit.

    python benchmarks/diffusers_caching/run.py                         FLUX, DiT, PixArt and HunyuanVideo, small
    python benchmarks/diffusers_caching/run.py --model flux --rounds 9
    python benchmarks/diffusers_caching/run.py --plot-only             the table and the plot from results.json alone

All variants take turns on copies of one model with random weights. Nothing is downloaded. cache-dit is optional: its
row is left out where the package is not installed (`pip install cache-dit`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cases import MAKERS, make_case
from haste.errors import UserError
from report import report, section
from rounds import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import CommonArgs, import_plot, make_parser, run_script  # noqa: E402

PLOT = import_plot()
HERE = Path(__file__).resolve().parent
ROUNDS = {"cpu": 5, "cuda": 5}


@dataclass
class Args(CommonArgs):
    """What to measure and where to write it; `parse` says of each what it is."""

    model: Sequence[str] = tuple(MAKERS)

    def check(self) -> None:
        super().check()
        if self.device != "cpu":
            raise UserError(f"--device must be cpu, as a thread's processor time is measured, got {self.device}")
        if self.threads not in (None, 1):
            raise UserError(f"--threads must be 1, as one thread's processor time is measured, got {self.threads}")


def parse(arguments: Sequence[str] | None = None) -> Args:
    parser = make_parser(__doc__, ROUNDS)
    parser.add_argument("--model", nargs="+", help=f"Of: {', '.join(MAKERS)}. Default: all")
    return Args(**vars(parser.parse_args(arguments)))


def main(args: Args) -> None:
    args.check()
    torch.set_num_threads(1)
    run_script(args, HERE, (measured(name, args) for name in args.model), section, report, PLOT)


def measured(name: str, args: Args) -> dict[str, Any]:
    return measure(make_case(name), args.rounds or ROUNDS["cpu"]) | {"packages": packages()}


def packages() -> dict[str, str]:
    """Versions of the caches that are compared."""
    found = {}
    for name in ("diffusers", "cache-dit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        raise SystemExit(f"run.py: {error}") from error
