"""Train a diffusion transformer (SiT) with HASTE, with REPA, or plain.

The quickest look: `haste train --recipe digits` trains on real handwritten digits, in minutes without a GPU.
`haste train --recipe digits --help` shows what the recipe sets. Started again, the same command goes on from the last
checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from haste.training.config import TrainConfig
from haste.training.recipes import recipe_config

Args = TrainConfig


def default_args(arguments: Sequence[str]) -> TrainConfig:
    """The recipe's values, which the other flags then override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="")
    known, _ = parser.parse_known_args(arguments)
    return recipe_config(known.recipe)


def main(args: TrainConfig) -> None:
    """Train; after Ctrl-C or SIGTERM, save and leave with the signal's usual exit status."""
    from transformers.utils.logging import disable_progress_bar

    from haste.training.trainer import train  # brings torch: only once the flags are known to be right

    disable_progress_bar()  # transformers' own, for loading weights; downloads still show theirs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = train(args)
    if result.interrupted is not None:
        print(
            f"haste train: stopped by {result.interrupted.name} after step {result.step}, which is saved; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(128 + result.interrupted)
    print(f"trained {result.step} steps; everything is in {result.folder}")
