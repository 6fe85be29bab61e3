"""The settings of a command, and whether two settings come to the same run.

    preset < file of --config < what the run in the folder has recorded < typed flags

each overrides the one before it. So a command that resumes a run need not repeat its settings.
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
from typing import Any, get_args, get_type_hints

from haste.errors import UserError, in_one_line, shorten
from haste.io import LARGEST_FILE, read_bytes, read_json, write_text
from haste.training.config import (
    PRESETS,
    SIZES,
    TRACKERS,
    TrainConfig,
    check_folder_name,
    preset_config,
    resolve,
    sections,
)
from haste.validation import build, check

logger = logging.getLogger(__name__)

PLACE = ("preset", "config", "output_dir", "exp_name", "resume_step")
"""What says where a command finds settings."""

CHANGEABLE = {
    "preset", "config", "output_dir", "exp_name", "init_from", "convention", "data_dir", "num_workers",
    "max_train_steps", "epochs", "logging_steps", "checkpointing_steps", "resume_step", "report_to", "logging_dir",
    "checkpoints_total_limit", "on_nan", "on_bad_file", "attention", "compile", "sampling_steps",
}  # fmt: skip
"""What may change when a run is resumed: the end, the bookkeeping or a folder, not the computation."""

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
"""Which of them decide whether others count."""

PUBLIC_LABEL_DROPOUT = 0.1
"""How often REPA's and HASTE's trainers drop a label, inside their model and whatever --cfg-prob says."""


# ---- the settings of a command ----


def command_config(arguments: Sequence[str]) -> TrainConfig:
    """What a command's settings are before its flags override them.

    A preset that is typed and that the run in the folder was not begun with is not overridden by that run: the trainer
    then refuses what differs. What the run decides and nobody typed is printed in one line.

    Raises:
        UserError: an unknown preset, or a file or recorded settings that cannot be read.
    """
    typed = _typed_place(arguments)
    file = read_config(Path(typed["config"]).expanduser()) if typed.get("config") else {}
    preset = typed.get("preset", file.get("preset", ""))
    config = replace(preset_config(preset), **{**file, "preset": preset})
    place = replace(config, **typed)
    if {"-h", "--help"} & set(arguments):
        return config
    try:
        check_folder_name("exp_name", place.exp_name)
    except UserError:  # whoever checks the flags says it
        return config
    folder = Path(place.output_dir).expanduser() / place.exp_name
    recorded = _recorded(folder, place.resume_step)
    if recorded is None or (preset and recorded.get("preset", "") != preset):
        return config
    recorded = {name: value for name, value in recorded.items() if name not in PLACE or name == "preset"}
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for word in arguments}
    if "report_to" not in flags:
        _leave_out_absent_trackers(recorded)
    if recorded.get("preset") not in PRESETS:
        recorded["preset"] = ""
    begun = replace(preset_config(recorded["preset"]), **{**file, "preset": preset})
    decided = [
        _as_typed(name, value)
        for name, value in recorded.items()
        if name not in flags and name != "num_classes" and value != getattr(begun, name)  # the data say num_classes
    ]
    if decided:
        print(f"as the run in {folder} has it: {' '.join(decided)}", file=sys.stderr)
    return replace(config, **recorded)


def _typed_place(arguments: Sequence[str]) -> dict[str, Any]:
    """Those of PLACE that are typed; none if one of them cannot be read, which whoever reads all flags says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in PLACE:
        kind = int if name == "resume_step" else str
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*spellings, dest=name, type=kind, default=argparse.SUPPRESS)
    try:
        known = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}
    return {name: value if isinstance(value, (str, int)) else "--" for name, value in known.items()}  # [] of --x=--


def _as_typed(name: str, value: Any) -> str:
    """A flag with its value, as a command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


def _leave_out_absent_trackers(recorded: dict[str, Any]) -> None:
    """A run that was logged elsewhere, and is resumed where that package is not, is logged without it."""
    trackers = [name for name in str(recorded.get("report_to", "none")).split(",") if name.strip() in TRACKERS]
    absent = [name for name in trackers if importlib.util.find_spec(name.strip()) is None]
    if absent:
        print(f"the run was logged to {', '.join(absent)}, which is not installed here: without it", file=sys.stderr)
        recorded["report_to"] = ",".join(name for name in trackers if name not in absent) or "none"


# ---- files of settings ----


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML file that is nested by component, as `write_config` writes it.

    Raises:
        UserError: no such file, no such key, a value of another type; names file, key, what it must be and what it is.
    """
    import yaml

    try:
        content = yaml.safe_load(read_bytes(path, min(LARGEST_FILE, 2**20)))
    except OSError as error:
        raise UserError(f"--config must be a YAML file of settings, got {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config must be a YAML file, got {path}, which is none: {in_one_line(error)}") from error
    components, hints, settings = sections(), get_type_hints(TrainConfig), {}
    for section, values in _mapping(content, str(path), components).items():
        for name, value in _mapping(values, f"{section} of {path}", components[section]).items():
            settings[name] = check(_from_yaml(value, hints[name]), hints[name], f"{section}.{name} of {path}")
    settings.pop("config", None)  # one file is enough
    return settings


def _mapping(values: Any, what: str, known: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The values, if they are named, and all by a known name; nothing, such as of an empty section, counts as {}."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{what} must hold named values, got {shorten(values)}")
    for key in values:
        if key not in known:
            home = [section for section, names in sections().items() if key in names]
            hint = f"; {key} belongs to {home[0]}" if home else ""
            raise UserError(f"a key of {what} must be one of {', '.join(known)}, got {shorten(key)}{hint}")
    return values


def _from_yaml(value: Any, hint: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a text, and a bare no for false."""
    if value is False and "no" in get_args(hint):
        return "no"
    if isinstance(value, str) and (hint is float or float in get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def write_config(path: Path, config: TrainConfig) -> None:
    """Write all settings as a file that `--config` takes; what says where they came from is left out."""
    import yaml

    values = asdict(config)
    content = {
        section: {name: values[name] for name in names if name not in ("preset", "config", "resume_step")}
        for section, names in sections().items()
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


# ---- what a run has recorded ----


FORMER_NAMES = {"recipe": "preset", "keep": "checkpoints_total_limit"}  # in what runs of earlier commits recorded


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether this trainer recorded them: every run of ours has its preset, if only as empty."""
    return "preset" in values or "recipe" in values


def known_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings among the values that a run recorded, this trainer's, REPA's or HASTE's, in our meaning.

    Raises UserError, naming `source`, for a value of another type than the setting's.
    """
    values = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
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


def _recorded(folder: Path, step: int) -> dict[str, Any] | None:
    """The settings of the run in a folder: of args.json, else of its newest checkpoint; None if it has neither."""
    file, checkpoints = folder / "args.json", folder / "checkpoints"
    if file.is_file():
        return known_settings(read_json(file, "the settings of a run"), str(file))
    if not any(checkpoints.glob("*.pt")):
        return None
    # Brings torch, which is not needed elsewhere here.
    from haste.training.checkpoint import list_checkpoints, settings_of
    from haste.weights import BrokenCheckpoint, read_file

    for path in reversed(list_checkpoints(checkpoints)):
        if step in (0, int(path.stem)):
            try:
                return known_settings(settings_of(read_file(path), path), f"args of {path}")
            except BrokenCheckpoint:  # the trainer says so, and resumes from the one before
                continue
    return None


# ---- the same run, or another ----


def differing_settings(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """'--seed (0, now 1)' for each setting that makes `new` another run than the one that had the settings `old`.

    What they come to is compared, not how it was typed. What `old` does not hold, because another trainer or an older
    version wrote it, is not compared.
    """
    recorded = known_settings(old, "the settings of the run")
    if "model" in recorded:  # a run from before a model's sizes could be given has those of --model
        recorded = {**dict.fromkeys(SIZES), **recorded}
    before = replace(new, **recorded)
    if before.num_classes is None or new.num_classes is None:  # as many as the data has, which is compared elsewhere
        before = replace(before, num_classes=new.num_classes)
    try:
        before = resolve(before)
    except UserError:  # a model that this version does not have
        logger.debug("the settings of the run are compared as they are")
    after = resolve(new)
    old_values, new_values = _computation(before), _computation(after)
    typed_before, typed_now = asdict(before), asdict(after)
    followers = (_unused(before) ^ _unused(after)) - SWITCHES  # they differ because another setting does
    return [
        f"--{name.replace('_', '-')} ({typed_before[name]}, now {typed_now[name]})"
        for name in new_values
        if name in recorded
        and name not in followers
        and typed_before[name] != typed_now[name]
        and not _same(name, old_values[name], new_values[name])
    ]


def _computation(config: TrainConfig) -> dict[str, Any]:
    """The settings on which the computation depends, None in place of those on which it does not."""
    from haste.teachers.loading import own_resolution

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
    from haste.teachers.loading import same_teacher

    same = same_teacher(old, new)
    if same is None:
        logger.warning("--enc-type is %s in place of %s, which is not here to compare it with", new, old)
    return same is not False
