"""Where the settings of a command come from, and whether two sets of settings describe the same run.

    preset < --config file < settings recorded in the run's folder < flags

Each overrides the ones before it. So the command that resumes a run need not repeat its settings.
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
    SIZES,
    TRACKERS,
    TrainConfig,
    check_folder_name,
    resolve,
    sections,
)
from haste.training.presets import PRESETS
from haste.validation import build, check

logger = logging.getLogger(__name__)

SOURCES = ("preset", "config", "output_dir", "exp_name", "resume_step")
"""Settings that tell a command where to find the others."""

CHANGEABLE = {
    "preset", "config", "output_dir", "exp_name", "init_from", "convention", "data_dir", "image_dir", "num_workers",
    "max_train_steps", "epochs", "logging_steps", "checkpointing_steps", "resume_step", "report_to", "logging_dir",
    "checkpoints_total_limit", "on_nan", "on_bad_file", "attention", "compile", "sampling_steps", "evaluation_steps",
    "gradient_checkpointing", "latents_dir",
}  # fmt: skip
"""Settings that may change when a run is resumed, as they do not change what is computed."""

RULE_SETTINGS: dict[str, set[str]] = {
    "fixed": set(),
    "cosine-ramp": {"ramp_start"},
    "gradient-cosine": {"probe_start", "probe_every", "probe_images", "probe_block", "probe_threshold"},
    "plateau": {"probe_start", "probe_every", "probe_images", "plateau_patience", "plateau_min_delta"},
}
"""The settings of each termination rule, besides --early-stop-point."""

ALIGNMENT_SETTINGS = set().union(*RULE_SETTINGS.values()) | {
    "enc_type", "attn_coeff", "proj_coeff", "layer_map", "encoder_depth", "projector_dim", "early_stop_point",
    "termination", "teacher_resolution", "teacher_grid", "projection_layer_type", "spnorm_method", "zscore_alpha",
}  # fmt: skip

EVALUATION_SETTINGS = {"evaluation_samples", "evaluation_features", "evaluation_reference"}
"""Settings that a run with evaluations keeps, so that its scores can be compared."""

SWITCHES = {
    "enc_type",
    "attn_coeff",
    "proj_coeff",
    "termination",
    "projection_layer_type",
    "spnorm_method",
    "disp_coeff",
    "sra_coeff",
}
"""Alignment settings that turn others on and off."""

BEFORE: dict[str, Any] = {
    "time_shift": 1.0, "optimizer": "adamw", "decay_shape": "cosine", "extra_ema_decays": "", "cls_coeff": None,
    "projection_layer_type": "mlp", "spnorm_method": "none", "disp_coeff": 0.0, "sra_coeff": 0.0,
}  # fmt: skip
"""Settings that the public trainers lack, with the value that they computed by."""

PUBLIC_LABEL_DROPOUT = 0.1
"""The label dropout inside REPA's and HASTE's model, whatever their --cfg-prob."""


# ---- the settings of a command ----


def command_config(arguments: Sequence[str]) -> TrainConfig:
    """The defaults of a command's flags: preset, --config file and the run's recorded settings.

    Recorded settings that are neither given nor defaults are printed in one line. With another --preset than the run's
    the recorded settings are left out; the trainer then refuses what differs.

    Raises:
        UserError: an unknown preset, or a file or recorded settings that cannot be read.
    """
    typed = _typed_sources(arguments)
    file = read_config(Path(typed["config"]).expanduser()) if typed.get("config") else {}
    preset = typed.get("preset", file.get("preset", ""))
    config = replace(TrainConfig.from_preset(preset), **{**file, "preset": preset})
    source = {**asdict(config), **typed}
    if {"-h", "--help"} & set(arguments):
        return config
    try:
        check_folder_name("exp_name", source["exp_name"])
    except UserError:  # raised again when all flags have been parsed
        return config
    folder = Path(source["output_dir"]).expanduser() / source["exp_name"]
    recorded = _recorded(folder, source["resume_step"])
    if recorded is None or (preset and recorded.get("preset", "") != preset):
        return config
    recorded = {name: value for name, value in recorded.items() if name not in SOURCES or name == "preset"}
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for word in arguments}
    if "report_to" not in flags:
        _drop_missing_trackers(recorded)
    if recorded.get("preset") not in PRESETS:
        recorded["preset"] = ""
    defaults = replace(TrainConfig.from_preset(recorded["preset"]), **{**file, "preset": preset})
    recorded.pop("prediction", None)  # the model has it; the trainer refuses another model by its name
    restored = [
        _as_flag(name, value)
        for name, value in recorded.items()
        if name not in flags and name != "num_classes" and value != getattr(defaults, name)  # the data has num_classes
    ]
    if restored:
        print(f"using the recorded settings of {folder}: {' '.join(restored)}", file=sys.stderr)
    return replace(config, **recorded)


def _typed_sources(arguments: Sequence[str]) -> dict[str, Any]:
    """Those of SOURCES that are typed; none if one has no value, which is an error once all flags are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in SOURCES:
        kind = int if name == "resume_step" else str
        spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*spellings, dest=name, type=kind, default=argparse.SUPPRESS)
    try:
        known = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}
    return {name: "--" if value == [] else value for name, value in known.items()}  # argparse makes [] of --x=--


def _as_flag(name: str, value: Any) -> str:
    """A flag with its value, as typed on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


def _drop_missing_trackers(recorded: dict[str, Any]) -> None:
    """Resume a run without the trackers whose packages are not installed here."""
    trackers = [name for name in str(recorded.get("report_to", "none")).split(",") if name.strip() in TRACKERS]
    missing = [name for name in trackers if importlib.util.find_spec(name.strip()) is None]
    if missing:
        print(f"not logging to {', '.join(missing)} as the run did, which is not installed", file=sys.stderr)
        recorded["report_to"] = ",".join(name for name in trackers if name not in missing) or "none"


# ---- files of settings ----


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file with sections, as `write_config` writes it.

    Raises:
        UserError: no such file, an unknown key, a value of another type; names the file and the key.
    """
    import yaml

    try:
        content = yaml.safe_load(read_bytes(path, min(LARGEST_FILE, 2**20)))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or in_one_line(error)
        raise UserError(f"--config must be a YAML file of settings, got {path}: {why}") from error
    components, hints, settings = sections(), get_type_hints(TrainConfig), {}
    for section, values in _mapping(content, str(path), components).items():
        for name, value in _mapping(values, f"{section} of {path}", components[section]).items():
            settings[name] = check(_from_yaml(value, hints[name]), hints[name], f"{section}.{name} of {path}")
    settings.pop("config", None)  # a file does not include another
    return settings


def _mapping(values: Any, what: str, known: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The values, if they are a mapping with known keys; an empty section counts as {}."""
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
    """YAML 1.1 reads 1e-4 as text, and a bare no as false."""
    if value is False and "no" in get_args(hint):
        return "no"
    if isinstance(value, str) and (hint is float or float in get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def write_config(path: Path, config: TrainConfig) -> None:
    """Write all settings as a --config file, without the preset and the file that they came from."""
    import yaml

    values = asdict(config)
    content = {
        section: {name: values[name] for name in names if name not in ("preset", "config", "resume_step")}
        for section, names in sections().items()
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


# ---- recorded settings ----


# In runs of earlier commits; cls is REG's name, in its checkpoints.
FORMER_NAMES = {"recipe": "preset", "keep": "checkpoints_total_limit", "cls": "cls_coeff"}


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether haste recorded these settings; all its runs record their preset, if only as empty."""
    return "preset" in values or "recipe" in values


def known_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings among the recorded values of a run of haste, REPA or HASTE, with haste's meaning.

    A setting that an older version of haste did not have is at its default, by which that version computed.

    Raises:
        UserError: a value of another type than the setting's; names `source`.
    """
    values = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
    values = _of_irepa(values, source) if "projection_layer_type" in values and not is_ours(values) else values
    held = asdict(build(TrainConfig, values, source))
    if is_ours(values):
        return held
    known = {name: held[name] for name in held if name in values}
    if "cfg_prob" in known:
        known["cfg_prob"] = _public_label_dropout(held["cfg_prob"], held["legacy"])
    return known


def _of_irepa(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of iREPA's trainer, which lists a coefficient, as text, for each of several losses of the features."""
    losses, coefficient = values.get("projection_loss_type", "cosine"), values.get("proj_coeff")
    if losses != "cosine":
        raise UserError(f"projection_loss_type of {source} must be cosine, got {shorten(losses)}")
    side = values.get("proj_kwargs_kernel_size", 3)
    if values["projection_layer_type"] == "conv" and side != 3:
        raise UserError(f"proj_kwargs_kernel_size of {source} must be 3, got {shorten(side)}")
    if not isinstance(coefficient, str):
        return dict(values)
    try:
        return {**values, "proj_coeff": float(coefficient)}
    except ValueError as error:
        raise UserError(f"proj_coeff of {source} must be a number, got {shorten(coefficient)}") from error


def _public_label_dropout(cfg_prob: float, legacy: bool) -> float:
    """The --cfg-prob with which haste drops labels as often as the public trainers did.

    With --legacy they drop them a second time, with probability --cfg-prob.
    """
    if not legacy or cfg_prob == PUBLIC_LABEL_DROPOUT:
        return PUBLIC_LABEL_DROPOUT
    kept = (1 - PUBLIC_LABEL_DROPOUT) * (1 - min(max(cfg_prob, 0.0), 1.0))
    return 1 - math.sqrt(kept)


def has_begun(folder: Path) -> bool:
    """Whether the run in a folder has a checkpoint or a log line. A start that failed before leaves only settings."""
    if any((folder / "checkpoints").glob("*.pt")):
        return True
    logs = (folder / name for name in ("log.jsonl", "log.txt"))  # log.txt is HASTE's and REPA's
    return any(log.is_file() and log.stat().st_size > 0 for log in logs)


def _recorded(folder: Path, step: int) -> dict[str, Any] | None:
    """The settings in a run's args.json, else in its newest checkpoint; None if it has not begun."""
    if not has_begun(folder):
        return None
    file, checkpoints = folder / "args.json", folder / "checkpoints"
    if file.is_file():
        return known_settings(read_json(file, "the settings of a run"), str(file))
    if not any(checkpoints.glob("*.pt")):
        return None
    # These import torch, which is not needed elsewhere here.
    from haste.training.checkpoint import list_checkpoints, settings_of
    from haste.weights import BrokenCheckpoint, read_file

    for path in reversed(list_checkpoints(checkpoints)):
        if step in (0, int(path.stem)):
            try:
                return known_settings(settings_of(read_file(path), path), f"args of {path}")
            except BrokenCheckpoint:  # the trainer logs it, and resumes from an earlier one
                continue
    return None


# ---- the same run, or another ----


def differing_settings(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """'--seed 0, not 1' for each setting with which `new` computes something else than a run with settings `old`.

    Resolved settings are compared, not how they were given. A setting that `old` lacks, because another trainer or an
    older version recorded it, is not compared.
    """
    recorded = {**BEFORE, **known_settings(old, "the settings of the run")}
    if "model" in recorded:  # versions without SIZES used those of --model
        recorded = {**dict.fromkeys(SIZES), **recorded}
    before = replace(new, **recorded)
    if before.num_classes is None or new.num_classes is None:  # those of the data, which is compared elsewhere
        before = replace(before, num_classes=new.num_classes)
    try:
        before = resolve(before)
    except UserError:  # a model that this version does not have
        logger.debug("the settings of the run are compared as recorded")
    after = resolve(new)
    old_values, new_values = _computation(before), _computation(after)
    typed_before, typed_now = _with_sizes(before), _with_sizes(after)
    followers = (_unused(before) ^ _unused(after)) - SWITCHES  # they differ because another setting does
    return [
        f"--{name.replace('_', '-')} {typed_before[name]}, not {typed_now[name]}"
        for name in new_values
        if name in recorded
        and name not in followers
        and typed_before[name] != typed_now[name]
        and not _same(name, old_values[name], new_values[name])
    ]


def _with_sizes(config: TrainConfig) -> dict[str, Any]:
    """All settings, with the sizes of --model in place of None."""
    from haste.models import find_size

    values = asdict(config)
    try:
        _, size = find_size(config.model)
    except UserError:  # a model that this version does not have
        return values
    return {**values, **{name: size.get(name) for name in SIZES if values[name] is None}}


def _computation(config: TrainConfig) -> dict[str, Any]:
    """The settings that change what is computed, in a form that can be compared; None for unused ones."""
    from haste.teachers.loading import own_resolution

    unused = _unused(config)
    values = {
        name: None if name in unused else value for name, value in asdict(config).items() if name not in CHANGEABLE
    }
    values["cfg_prob"] = values["legacy"] = round(config.label_dropout, 12)
    if values["enc_type"] is not None:
        values["enc_type"] = config.teachers if config.aligns_features else config.teachers[:1]
    if values["teacher_grid"] == "match":  # then the grids determine the resolution
        values["teacher_resolution"] = None
    elif values["teacher_grid"] is not None:
        values["teacher_resolution"] = config.teacher_resolution or own_resolution(config.teachers[0])
    if values["probe_block"] == 0 and config.aligns_features:
        values["probe_block"] = config.encoder_depth
    return values


def _unused(config: TrainConfig) -> set[str]:
    """The settings of alignment and evaluation that have no effect."""
    unused = set() if config.disp_coeff else {"disp_depth", "disp_tau"}
    unused |= set() if config.evaluation_steps else EVALUATION_SETTINGS
    if config.sra_coeff:
        used = {"encoder_depth", "early_stop_point", "termination"} | RULE_SETTINGS[config.termination]
        return unused | (ALIGNMENT_SETTINGS - used)
    unused.add("block_out_t")
    if not config.teachers:
        return unused | ALIGNMENT_SETTINGS
    unused |= set().union(*RULE_SETTINGS.values()) - RULE_SETTINGS[config.termination]
    if not config.aligns_features:
        unused |= {"encoder_depth", "projector_dim", "projection_layer_type", "spnorm_method"}
    if config.projection_layer_type == "conv":
        unused.add("projector_dim")
    if config.spnorm_method == "none" or not config.aligns_features:
        unused.add("zscore_alpha")
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
        logger.warning("--enc-type %s cannot be compared with the run's %s, as a folder is missing", new, old)
    return same is not False
