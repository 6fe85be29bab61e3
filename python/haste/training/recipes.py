"""Named sets of settings. A recipe is a dictionary of defaults; every flag that is typed overrides its value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haste.errors import UserError
from haste.training.config import TrainConfig

RECIPES: dict[str, dict[str, Any]] = {
    # Real pictures, a student and a teacher that two processor cores train in minutes.
    "digits": {
        "exp_name": "digits",
        "data_dir": "digits",
        "resolution": 8,
        "model": "SiT-Digits/2",
        "enc_type": "digits-vit",
        "layer_map": "0:0,1:1,2:2,3:3",
        "encoder_depth": 4,
        "projector_dim": 256,
        "early_stop_point": 500,
        "batch_size": 64,
        "max_train_steps": 1000,
        "learning_rate": 4e-3,
        "ema_decay": 0.99,
        "mixed_precision": "no",
        "logging_steps": 10,
        "checkpointing_steps": 200,
    },
}


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe, or the trainer's own for an empty name; UserError, with the known names, for others."""
    if not name:
        return TrainConfig()
    if name not in RECIPES:
        raise UserError(f"--recipe is {name!r}; it must be one of: {', '.join(RECIPES)}")
    return replace(TrainConfig(), recipe=name, **RECIPES[name])
