"""What the settings of a run come to, and whether two settings come to the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from haste.alignment.layers import choose_encoder_depth, choose_layer_map
from haste.errors import UserError
from haste.teachers.identity import own_resolution, same_teacher
from haste.training.config import CHANGEABLE, TrainConfig
from haste.training.recorded import known_settings
from haste.training.students import student_shape

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
    depth = student_shape(config.model)["depth"]
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
