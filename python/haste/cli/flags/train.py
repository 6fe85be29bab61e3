"""Train a diffusion transformer (SiT) with HASTE, with REPA, or plain.

The quickest look: `haste train --preset digits` trains on real handwritten digits, in minutes without a GPU.
`haste train --preset` lists all presets with what they set. Started again, the same command goes on from the last
checkpoint; what it does not say is as the run was begun. On several GPUs: `accelerate launch -m haste train ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from haste.training.config import TrainConfig, list_presets, preset_config
from haste.training.resume import follow_run

Args = TrainConfig

LIST = "list"  # what --preset means without a name


def default_args(arguments: Sequence[str]) -> TrainConfig:
    """The values of the preset, under those of the run that is resumed; the other flags then override both.

    --preset without a name lists the presets instead.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="", const=LIST)
    known, _ = parser.parse_known_args(arguments)
    if known.preset == LIST:
        print(list_presets())
        raise SystemExit(0)
    preset = known.preset if isinstance(known.preset, str) else "--"  # argparse makes [] of --preset=--
    return follow_run(preset_config(preset), arguments)
