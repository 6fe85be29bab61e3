"""Train a diffusion transformer (SiT) with HASTE, with REPA, or plain.

The quickest look: `haste train --recipe digits` trains on real handwritten digits, in minutes without a GPU.
`haste train --recipe` lists all recipes with what they set. Started again, the same command goes on from the last
checkpoint; what it does not say is as the run was begun. On several GPUs: `accelerate launch -m haste train ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from haste.training.config import TrainConfig
from haste.training.recipes import list_recipes, recipe_config
from haste.training.recorded import follow_run

Args = TrainConfig

LIST = "list"  # what --recipe means without a name


def default_args(arguments: Sequence[str]) -> TrainConfig:
    """The values of the recipe, under those of the run that is resumed; the other flags then override both.

    --recipe without a name lists the recipes instead.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", default="", const=LIST)
    known, _ = parser.parse_known_args(arguments)
    if known.recipe == LIST:
        print(list_recipes())
        raise SystemExit(0)
    recipe = known.recipe if isinstance(known.recipe, str) else "--"  # argparse makes [] of --recipe=--
    return follow_run(recipe_config(recipe), arguments)
