"""Carries out `haste train`, also as `accelerate launch -m haste.cli.train ...`."""

from __future__ import annotations

import logging
import os
import sys

from haste.training.config import TrainConfig, describe_run


def main(args: TrainConfig) -> None:
    """Train; after Ctrl-C or SIGTERM, save and leave with the signal's usual exit status."""
    from transformers.utils.logging import disable_progress_bar

    from haste.training.trainer import train

    disable_progress_bar()  # transformers' own, for loading weights; downloads still show theirs
    first = os.environ.get("RANK", "0") == "0"  # of several processes one tells what happens, all tell what is wrong
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    if args.preset:
        logging.getLogger(__name__).info("preset %s: %s", args.preset, describe_run(args))
    result = train(args)
    if result.interrupted is not None:
        if first:
            print(
                f"haste train: stopped by {result.interrupted.name} after step {result.step}, which is saved; "
                "the same command goes on from there",
                file=sys.stderr,
            )
        raise SystemExit(128 + result.interrupted)
    if first:
        print(f"trained {result.step} steps; everything is in {result.folder}")


if __name__ == "__main__":  # accelerate launch -m haste.cli.train ...
    from haste.cli.main import main as haste

    haste(["train", *sys.argv[1:]])
