"""Reading the folder of a DiTPipeline of diffusers, or of its transformer, as a checkpoint.

The file of the transformer's weights stands for the folder: `weights_file` finds it, and `as_checkpoint` makes of it
what `read_checkpoint` goes on with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from haste.errors import UserError
from haste.io import read_json
from haste.models import check_config
from haste.models.dit_diffusers import CLASS_NAMES, from_diffusers, is_transformer, positions
from haste.models.dit_times import NAMES as TIMES
from haste.vae import SD_LATENTS, LatentFormat
from haste.validation import shown
from haste.weights import read_file

logger = logging.getLogger(__name__)

INDEX, CONFIG, PIPELINE = "model_index.json", "config.json", "DiTPipeline"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
RECORD = "haste.json"  # in the folder of an export: of what it was made
TIMES_FILE = "haste_times.safetensors"  # beside the weights: the embedder of times as DiT has it


def weights_file(folder: Path, flag: str) -> Path | None:
    """The weights of a pipeline's folder, of an export without a VAE, or of a transformer's; None for a folder of
    something else.

    Raises:
        UserError: it is of another pipeline, or has no weights that can be read.
    """
    wanted = f"{flag} must be the folder of a {PIPELINE} or of its transformer"
    if (folder / INDEX).is_file():
        kind = read_json(folder / INDEX, "the index of a pipeline").get("_class_name")
        if kind != PIPELINE:
            raise UserError(f"{wanted}, got {folder}, of the class {shown(kind)}")
        transformer = folder / "transformer"
    elif (folder / RECORD).is_file():  # an export without a VAE has no index
        transformer = folder / "transformer"
    elif (folder / CONFIG).is_file() and not (folder / "checkpoints").is_dir():
        kind = read_json(folder / CONFIG, "the config of a model").get("_class_name")
        if kind not in CLASS_NAMES:
            raise UserError(f"{wanted}, got {folder}, of the class {shown(kind)}")
        transformer = folder
    else:
        return None
    found = next((transformer / name for name in WEIGHTS if (transformer / name).is_file()), None)
    if found is None:
        raise UserError(f"{wanted}, got {folder}, which lacks {(transformer / WEIGHTS[0]).relative_to(folder)}")
    return found


def folder_of(file: Path) -> Path | None:
    """The folder of a pipeline, or of an export without a VAE, that a file of weights is of; None if there is none."""
    folder = file.parent.parent
    known = file.parent.name == "transformer" and any((folder / name).is_file() for name in (INDEX, RECORD))
    return folder if known else None


def is_of_pipeline(content: Mapping[str, Any]) -> bool:
    """Whether a file, as `read_file` returns it, is of diffusers' transformer."""
    weights = content.get("ema", content)
    return isinstance(weights, Mapping) and is_transformer(weights)


def as_checkpoint(weights: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """What a checkpoint of haste holds, from the weights of a transformer and what is beside them.

    Raises:
        UserError: its config.json is missing, or it is no DiT.
    """
    config = read_json(file.with_name(CONFIG), "the config of a transformer, beside its weights")
    ours, model_config, fitted = from_diffusers(weights, config, _times_before(file), str(file))
    if fitted is not None:
        logger.info("the embedding of times of %s was fitted to diffusers' frequencies; it is fitted back, within %.1e",
                    file, fitted.error)  # fmt: skip
    model_config = check_config(model_config, str(file))
    ours["pos_embed"] = positions(model_config, ours[TIMES[0]].dtype)
    content: dict[str, Any] = {"ema": ours, "model_config": model_config, "args": {}}
    pipeline = folder_of(file)
    if pipeline is None or not (pipeline / INDEX).is_file():
        return content
    names = _class_names(pipeline, model_config["num_classes"])
    if names:
        content["class_names"] = names
    if (pipeline / "vae" / CONFIG).is_file():
        content["latents"] = asdict(_latents(pipeline / "vae"))
    return content


def _times_before(file: Path) -> dict[str, Tensor] | None:
    """The weights of TIMES_FILE; None without one."""
    beside = file.with_name(TIMES_FILE)
    if not beside.is_file():
        return None
    weights = read_file(beside).get("ema")
    if not isinstance(weights, dict) or set(weights) != set(TIMES):
        raise UserError(f"{beside} must hold {', '.join(TIMES)} alone")
    return weights


def _class_names(pipeline: Path, num_classes: int) -> list[str]:
    """The names of the classes by label; empty if the index does not have all."""
    names = read_json(pipeline / INDEX, "the index of a pipeline").get("id2label")
    if not isinstance(names, Mapping) or set(names) != {str(label) for label in range(num_classes)}:
        return []
    found = [names[str(label)] for label in range(num_classes)]
    return found if all(isinstance(name, str) for name in found) else []


def _latents(vae: Path) -> LatentFormat:
    """The format of the pipeline's latents, which it scales by one number and does not shift."""
    latents = LatentFormat.of(str(vae))
    factor = read_json(vae / CONFIG, "the config of a VAE").get("scaling_factor")
    factor = SD_LATENTS.scale[0] if factor is None else factor
    return replace(latents, shift=(0.0,) * latents.channels, scale=(float(factor),) * latents.channels)
