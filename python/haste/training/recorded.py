"""What a run has recorded of its settings: what a command that goes on with it need not say again.

The values of a command are, each over the one before: those of the recipe, those of the run that is in the folder,
those that are typed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from haste.errors import UserError
from haste.io import read_json
from haste.plain import build
from haste.training.config import TRACKERS, TrainConfig, check_folder_name
from haste.training.recipes import RECIPES, recipe_config

# What says where the run is and with what checkpoint this start begins, not how the run was begun.
NOT_FOLLOWED = ("output_dir", "exp_name", "resume_step")

# How often REPA's and HASTE's trainers drop a label, inside their model and whatever --cfg-prob says.
PUBLIC_LABEL_DROPOUT = 0.1


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether this trainer recorded them: every run of ours has its recipe, if only as empty."""
    return "recipe" in values


def known_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings among the values that a run recorded, this trainer's, REPA's or HASTE's, in our meaning.

    Raises UserError, naming `source`, for a value of another type than the setting's.
    """
    held = asdict(build(TrainConfig, values, source))
    known = {name: held[name] for name in held if name in values}
    if not is_ours(values) and "cfg_prob" in known:
        known["cfg_prob"] = _public_label_dropout(held["cfg_prob"], held["legacy"])
    return known


def _public_label_dropout(cfg_prob: float, legacy: bool) -> float:
    """The --cfg-prob with which we drop labels as often as the public trainers did.

    With --legacy they drop them a second time, as often as their --cfg-prob says.
    """
    if not legacy or cfg_prob == PUBLIC_LABEL_DROPOUT:
        return PUBLIC_LABEL_DROPOUT
    kept = (1 - PUBLIC_LABEL_DROPOUT) * (1 - min(max(cfg_prob, 0.0), 1.0))
    return 1 - math.sqrt(kept)


def follow_run(defaults: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """The defaults of a command: a recipe's, under those of the run that it goes on with, if there is one.

    A recipe that is typed and that the run was not begun with speaks for itself: then the defaults stay, and the
    trainer refuses what differs. What the run decides and nobody typed is said in one line.
    Raises UserError for settings in the folder that cannot be read.
    """
    place = _place(defaults, arguments)
    found = None if place is None else _recorded(*place)
    if found is None or (defaults.recipe and found.get("recipe", "") != defaults.recipe):
        return defaults
    followed = {name: value for name, value in found.items() if name not in NOT_FOLLOWED}
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for word in arguments}
    if "report_to" not in typed:
        _leave_out_absent_trackers(followed)
    if followed.get("recipe") not in RECIPES:
        followed["recipe"] = ""
    begun = recipe_config(followed["recipe"])
    told = [
        _as_typed(name, value)
        for name, value in followed.items()
        if name not in typed
        and name != "num_classes"  # which the data say
        and value != getattr(defaults if name == "recipe" else begun, name)
    ]
    if told:
        print(f"as the run in {place[0]} has it: {' '.join(told)}", file=sys.stderr)
    return replace(defaults, **followed)


def _as_typed(name: str, value: Any) -> str:
    """A flag with its value, as a command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


def _leave_out_absent_trackers(followed: dict[str, Any]) -> None:
    """A run that was logged elsewhere, and goes on where that package is not, is logged without it."""
    trackers = [name for name in str(followed.get("report_to", "none")).split(",") if name.strip() in TRACKERS]
    absent = [name for name in trackers if importlib.util.find_spec(name.strip()) is None]
    if absent:
        print(f"the run was logged to {', '.join(absent)}, which is not installed here: without it", file=sys.stderr)
        followed["report_to"] = ",".join(name for name in trackers if name not in absent) or "none"


def _place(defaults: TrainConfig, arguments: Sequence[str]) -> tuple[Path, int] | None:
    """The folder that a command means, and the step to go on from, 0 for the newest; None if it means none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output-dir", "--output_dir", default=defaults.output_dir)
    parser.add_argument("--exp-name", "--exp_name", default=defaults.exp_name)
    parser.add_argument("--resume-step", "--resume_step", type=int, default=0)
    try:
        known, _ = parser.parse_known_args(arguments)
        if not (isinstance(known.exp_name, str) and isinstance(known.output_dir, str)):  # argparse makes [] of --x=--
            return None
        check_folder_name("exp_name", known.exp_name)
    except (argparse.ArgumentError, UserError):  # whoever reads the flags in earnest says it
        return None
    if {"-h", "--help"} & set(arguments):
        return None
    return Path(known.output_dir).expanduser() / known.exp_name, known.resume_step


def _recorded(folder: Path, step: int) -> dict[str, Any] | None:
    """The settings of the run in a folder: of args.json, else of its newest checkpoint; None if it has neither."""
    file, checkpoints = folder / "args.json", folder / "checkpoints"
    if file.is_file():
        return known_settings(read_json(file, "the settings of a run"), str(file))
    if not any(checkpoints.glob("*.pt")):
        return None
    # Brings torch, which is not needed elsewhere here.
    from haste.training.checkpoint import list_checkpoints, read_checkpoint, settings_of
    from haste.training.weight_files import BrokenCheckpoint

    for path in reversed(list_checkpoints(checkpoints)):
        if step in (0, int(path.stem)):
            try:
                return known_settings(settings_of(read_checkpoint(path), path), f"args of {path}")
            except BrokenCheckpoint:  # the trainer says so, and goes on from the one before
                continue
    return None
