"""What the settings of a run come to, and whether two settings come to the same run.

What a run has recorded of its settings: what a command that goes on with it need not say again.

The values of a command are, each over the one before: those of the preset, those of the run that is in the folder,
those that are typed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from haste.alignment.losses import choose_encoder_depth, choose_layer_map
from haste.errors import UserError
from haste.io import read_json
from haste.models import model_depth
from haste.teachers.loading import own_resolution, same_teacher
from haste.training.config import (
    CHANGEABLE,
    PRESETS,
    TRACKERS,
    TrainConfig,
    check_folder_name,
    preset_config,
)
from haste.validation import build

logger = logging.getLogger(__name__)

RULE_SETTINGS: dict[str, set[str]] = {
    "fixed": set(),
    "cosine-ramp": {"ramp_start"},
    "gradient-cosine": {"probe_start", "probe_every", "probe_images", "probe_block", "probe_threshold"},
    "plateau": {"probe_start", "probe_every", "probe_images", "plateau_patience", "plateau_min_delta"},
}
"""What each rule of termination goes by, besides --early-stop-point."""

ALIGNMENT_SETTINGS = set().union(*RULE_SETTINGS.values()) | {
    "enc_type", "attn_coeff", "proj_coeff", "layer_map", "encoder_depth", "projector_dim", "early_stop_point",
    "termination", "teacher_resolution", "teacher_grid",
}  # fmt: skip

SWITCHES = {"enc_type", "attn_coeff", "proj_coeff", "termination"}
"""What decides whether others of them count."""


def resolve(config: TrainConfig, num_classes: int | None = None) -> TrainConfig:
    """The same run, with values in place of what a setting leaves open. A run records itself so.

    num_classes: of the data, if they are known.
    Raises UserError for a model or a layer map that there is not.
    """
    depth = model_depth(config.model)
    encoder_depth, layer_map = config.encoder_depth, config.layer_map
    if encoder_depth is None:
        encoder_depth = choose_encoder_depth(config.model, depth, config.aligns_attention)
    if config.aligns_attention:
        layer_map = str(choose_layer_map(layer_map, config.model))
    return replace(
        config,
        num_classes=num_classes if config.num_classes is None else config.num_classes,
        encoder_depth=encoder_depth,
        layer_map=layer_map,
    )


def differing_settings(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """'--seed (0, now 1)' for each setting that makes `new` another run than the one that had the settings `old`.

    What they come to is compared, not how it was said. What `old` does not hold, because another trainer or an older
    version wrote it, is not compared.
    """
    recorded = known_settings(old, "the settings of the run")
    before = replace(new, **recorded)
    if before.num_classes is None or new.num_classes is None:  # as many as the data has, which is compared elsewhere
        before = replace(before, num_classes=new.num_classes)
    try:
        before = resolve(before)
    except UserError:  # a model that this version does not have
        logger.debug("the settings of the run are compared as they are")
    after = resolve(new)
    old_values, new_values = _what_decides(before), _what_decides(after)
    said_before, said_now = asdict(before), asdict(after)
    followers = (_unused(before) ^ _unused(after)) - SWITCHES  # they differ because another setting does
    return [
        f"--{name.replace('_', '-')} ({said_before[name]}, now {said_now[name]})"
        for name in new_values
        if name in recorded
        and name not in followers
        and said_before[name] != said_now[name]
        and not _same(name, old_values[name], new_values[name])
    ]


def _what_decides(config: TrainConfig) -> dict[str, Any]:
    """The settings on which the computation depends, None in place of those on which it does not."""
    unused = _unused(config)
    values = {
        name: None if name in unused else value for name, value in asdict(config).items() if name not in CHANGEABLE
    }
    values["cfg_prob"] = values["legacy"] = round(config.label_dropout, 12)
    if values["enc_type"] is not None:
        values["enc_type"] = config.teachers if config.aligns_features else config.teachers[:1]
    if values["teacher_grid"] == "match":  # then the grids alone say what the teacher sees
        values["teacher_resolution"] = None
    elif values["teacher_grid"] is not None:
        values["teacher_resolution"] = config.teacher_resolution or own_resolution(config.teachers[0])
    if values["probe_block"] == 0 and config.aligns_features:
        values["probe_block"] = config.encoder_depth
    return values


def _unused(config: TrainConfig) -> set[str]:
    if not config.teachers:
        return ALIGNMENT_SETTINGS
    unused = set().union(*RULE_SETTINGS.values()) - RULE_SETTINGS[config.termination]
    if not config.aligns_features:
        unused |= {"encoder_depth", "projector_dim"}
    if not config.aligns_attention:
        unused.add("layer_map")
    return unused


def _same(name: str, old: Any, new: Any) -> bool:
    if name != "enc_type" or old is None or new is None:
        return old == new
    return len(old) == len(new) and all(map(_same_teacher, old, new))


def _same_teacher(old: str, new: str) -> bool:
    same = same_teacher(old, new)
    if same is None:
        logger.warning("--enc-type is %s in place of %s, which is not here to compare it with", new, old)
    return same is not False


# What says where the run is and with what checkpoint this start begins, not how the run was begun.
NOT_FOLLOWED = ("output_dir", "exp_name", "resume_step")

# How often REPA's and HASTE's trainers drop a label, inside their model and whatever --cfg-prob says.
PUBLIC_LABEL_DROPOUT = 0.1


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether this trainer recorded them: every run of ours has its preset, if only as empty."""
    return "preset" in values


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
    """The defaults of a command: a preset's, under those of the run that it goes on with, if there is one.

    A preset that is typed and that the run was not begun with speaks for itself: then the defaults stay, and the
    trainer refuses what differs. What the run decides and nobody typed is said in one line.
    Raises UserError for settings in the folder that cannot be read.
    """
    place = _place(defaults, arguments)
    found = None if place is None else _recorded(*place)
    if found is None or (defaults.preset and found.get("preset", "") != defaults.preset):
        return defaults
    followed = {name: value for name, value in found.items() if name not in NOT_FOLLOWED}
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for word in arguments}
    if "report_to" not in typed:
        _leave_out_absent_trackers(followed)
    if followed.get("preset") not in PRESETS:
        followed["preset"] = ""
    begun = preset_config(followed["preset"])
    told = [
        _as_typed(name, value)
        for name, value in followed.items()
        if name not in typed
        and name != "num_classes"  # which the data say
        and value != getattr(defaults if name == "preset" else begun, name)
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
    from haste.weights import BrokenCheckpoint

    for path in reversed(list_checkpoints(checkpoints)):
        if step in (0, int(path.stem)):
            try:
                return known_settings(settings_of(read_checkpoint(path), path), f"args of {path}")
            except BrokenCheckpoint:  # the trainer says so, and goes on from the one before
                continue
    return None
