"""Named sets of settings. A recipe is a dictionary of defaults; every flag that is typed overrides its value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haste.errors import UserError
from haste.training.config import TrainConfig

# Real pictures, a student and a teacher that two processor cores train in minutes.
DIGITS: dict[str, Any] = {
    "exp_name": "digits",
    "data_dir": "digits",
    "resolution": 8,
    "model": "SiT-Digits/2",
    "enc_type": "digits-vit",
    "layer_map": "0:0,1:1,2:2,3:3",
    "encoder_depth": 4,
    "projector_dim": 256,
    "attn_coeff": 0.5,
    "early_stop_point": 500,
    "batch_size": 64,
    "max_train_steps": 1000,
    "learning_rate": 4e-3,
    "ema_decay": 0.99,
    "mixed_precision": "no",
    "logging_steps": 10,
    "checkpointing_steps": 200,
    "sampling_steps": 200,
}

# HASTE (arXiv 2505.16792): layer pairs and feature depth per size, for DINOv2-B. S is not in the paper; it has the
# depth of B and takes its values.
DEEP = {"layer_map": "4:8,5:9,6:10,7:11", "encoder_depth": 8}
SHALLOW = {"layer_map": "2:7,3:9,4:11", "encoder_depth": 5}
HASTE_LAYERS = {"S": SHALLOW, "B": SHALLOW, "L": DEEP, "XL": DEEP}

# τ. At 512 pixels the paper gives XL's alone; the others keep what they have at 256.
HASTE_END = {
    256: {"S": 100_000, "B": 100_000, "L": 250_000, "XL": 250_000},
    512: {"S": 100_000, "B": 100_000, "L": 250_000, "XL": 300_000},
}

# REPA (arXiv 2410.06940): features alone, to the end. S, again, as B.
REPA_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8}


def _published_recipes() -> dict[str, dict[str, Any]]:
    """haste-xl-256, repa-xl-256, plain-xl-256 and so on, for every size at 256 and 512 pixels."""
    recipes = {}
    for resolution, ends in HASTE_END.items():
        for size, end in ends.items():
            student = {"resolution": resolution, "model": f"SiT-{size}/2"}
            methods = {
                "haste": {"attn_coeff": 0.5, **HASTE_LAYERS[size], "early_stop_point": end},
                "repa": {"attn_coeff": 0.0, "encoder_depth": REPA_DEPTH[size], "early_stop_point": -1},
                "plain": {"attn_coeff": 0.0, "proj_coeff": 0.0, "early_stop_point": -1},
            }
            for method, settings in methods.items():
                name = f"{method}-{size.lower()}-{resolution}"
                recipes[name] = {"exp_name": name, **student, **settings}
    return recipes


RECIPES: dict[str, dict[str, Any]] = {"digits": DIGITS, **_published_recipes()}


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe, or the trainer's own for an empty name; UserError for a name that is not known."""
    if not name:
        return TrainConfig()
    if name not in RECIPES:
        raise UserError(
            f"--recipe is {name!r}; it must be digits, haste-xl-256 or another that `haste train --recipe` lists"
        )
    return replace(TrainConfig(), recipe=name, **RECIPES[name])


def describe_recipe(name: str) -> str:
    """What a recipe sets, as one would type it."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in RECIPES[name].items())


def describe_run(config: TrainConfig) -> str:
    """What a recipe sets, with the values that the run has; of overridden ones the recipe's own behind it."""
    parts = []
    for key, own in RECIPES[config.recipe].items():
        value = getattr(config, key)
        parts.append(f"--{key.replace('_', '-')} {value}" + ("" if value == own else f" (recipe: {own})"))
    return " ".join(parts)


def list_recipes() -> str:
    """Every recipe with what it sets, one per paragraph."""
    return "\n\n".join(f"{name}\n  {describe_recipe(name)}" for name in RECIPES)
