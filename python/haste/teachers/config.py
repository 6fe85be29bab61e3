"""The config of a teacher, held against what this package can run before anything is built from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import cached_file

from haste.errors import UserError, in_one_line
from haste.hub import loading_arguments, refuse_unreachable
from haste.io import read_json
from haste.limits import in_bytes
from haste.teachers.families import VISION_TOWERS, require_known
from haste.teachers.grids import own_image_size, patch_size_of
from haste.weights import weights_size

# The least and the most of what a config may ask for. The largest encoders have 80 layers of 3,200.
SIZES = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 2**20),
    "num_channels": (1, 1024),
    "num_register_tokens": (0, 1024),
    "num_patches": (1, 2**20),
}
OPTIONAL = ("intermediate_size", "num_register_tokens", "num_patches")  # not every family has them

# Numbers of a model per byte of its files, at most. Half of a two-tower model may be left out, and there are weights of
# one byte; what is missing is refused by name later, but not before memory was taken for it.
MOST_NUMBERS_PER_BYTE = 4


def load_config(name: str, source: str, flag: str = "--enc-type") -> PretrainedConfig:
    """The config of the image side of the checkpoint, its sizes within bounds.

    flag: what gave the name, for the sentence. Raises UserError if there is none, it is of a family that is not known,
    or asks for what the weights beside it cannot hold. No program that comes with a checkpoint is run.
    """
    refuse_unreachable(name, source, flag)
    values = read_checkpoint_json(name, source, "config.json", "the config of a teacher")
    if values is None:
        raise UserError(f"the teacher {name} cannot be loaded: it has no config.json")
    require_known(name, values.get("model_type"))
    if values.get("quantization_config") is not None:
        raise UserError(f"the teacher {name} is quantised; its weights must be in float32, float16 or bfloat16")
    for part in (values, values.get("vision_config"), values.get("text_config")):
        _check_sizes(name, part if isinstance(part, dict) else {})  # transformers makes lists of these lengths
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **loading_arguments(source))
    except Exception as error:  # a config of the wrong kinds of values leads transformers to raise anything
        raise UserError(f"the teacher {name} cannot be loaded: {in_one_line(error)}") from error
    tower = config.vision_config if config.model_type in VISION_TOWERS else config
    _check_sizes(name, {key: getattr(tower, key, None) for key in SIZES})
    patch_size_of(name, tower)
    own_image_size(name, tower)
    if Path(source).is_dir():
        _require_weights(name, Path(source), config)
    return tower


def read_checkpoint_json(name: str, source: str, file_name: str, what: str) -> dict[str, Any] | None:
    """The content of a JSON file of the checkpoint; None if it has no such file."""
    if Path(source).is_dir():
        path = Path(source) / file_name
        return read_json(path, what) if os.path.lexists(path) else None
    found = cached_file(
        source,
        file_name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **loading_arguments(source),
    )
    return None if found is None else read_json(Path(found), what)


def _check_sizes(name: str, values: dict[str, Any]) -> None:
    for key in values.keys() & SIZES.keys():
        (least, most), value = SIZES[key], values[key]
        if value is None and key in OPTIONAL:
            continue
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"the teacher {name} has {key} {str(value)[:40]}; it must be {least} to {most:,}")


def _require_weights(name: str, folder: Path, config: PretrainedConfig) -> None:
    """UserError if the config asks for far more numbers than the files beside it have bytes."""
    size = weights_size(folder, f"the teacher {name}")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # sizes that do not go together
        raise UserError(f"the teacher {name} cannot be loaded: {in_one_line(error)}") from error
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > MOST_NUMBERS_PER_BYTE * size:
        raise UserError(
            f"the teacher {name} cannot be loaded: its config.json asks for {numbers:,} numbers, and its weights "
            f"(*.safetensors, *.bin) have {in_bytes(size)}"
        )
