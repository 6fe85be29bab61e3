"""Train a diffusion transformer with HASTE, with REPA, or vanilla.

The quickest look: `haste train --preset digits` trains on real handwritten digits, in minutes without a GPU.
`haste train --preset` lists all presets with what they set. Started again, the same command resumes from the last
checkpoint; what it leaves out is as the run was begun. On several GPUs: `accelerate launch -m haste train ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from haste.training.config import TrainConfig, describe_run, list_presets
from haste.training.settings import command_config

LIST = "list"  # what --preset means without a name


def default_config(arguments: Sequence[str]) -> TrainConfig:
    """What the flags override; --preset without a name lists the presets instead."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="", const=LIST)
    if parser.parse_known_args(arguments)[0].preset == LIST:
        print(list_presets())
        raise SystemExit(0)
    return command_config(arguments)


def main(config: TrainConfig) -> None:
    """Train; after Ctrl-C or SIGTERM, save and leave with the signal's usual exit status."""
    from transformers.utils.logging import disable_progress_bar

    from haste.training.trainer import train

    disable_progress_bar()  # transformers' own, for loading weights; downloads still show theirs
    first = os.environ.get("RANK", "0") == "0"  # of several processes one tells what happens, all tell what is wrong
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    if config.preset:
        logging.getLogger(__name__).info("preset %s: %s", config.preset, describe_run(config))
    result = train(config)
    if result.interrupted is not None:
        if first:
            print(
                f"haste train: stopped by {result.interrupted.name} after step {result.step}, which is saved; "
                "the same command resumes from there",
                file=sys.stderr,
            )
        raise SystemExit(128 + result.interrupted)
    if first:
        print(f"trained {result.step} steps; everything is in {result.folder}")


if __name__ == "__main__":  # accelerate launch -m haste.cli.train ...
    from haste.cli.main import main as haste

    haste(["train", *sys.argv[1:]])
