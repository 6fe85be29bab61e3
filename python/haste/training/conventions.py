"""Whose conventions a checkpoint keeps: which way time runs, what the model predicts, how its authors sample.

- repa: HASTE, REPA and this trainer. t = 0 is data, the velocity is ε − x.
- sit: SiT's own trainer. t = 1 is data, the velocity is x − ε. Its sampler guides three of four channels.

DiT predicts noise, with weights of the same names and shapes as SiT's. What was trained otherwise is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from haste.errors import UserError

logger = logging.getLogger(__name__)

Convention = Literal["repa", "sit"]

# SiT's names of what is here called so.
SIT_PATHS = {"Linear": "linear", "GVP": "cosine"}
SIT_PREDICTIONS = ("velocity",)

# Settings that only the trainers of this family keep, and those that only SiT's keeps.
OF_REPA = ("enc_type", "proj_coeff", "attn_coeff", "encoder_depth", "projector_embed_dims")
OF_SIT = ("loss_weight", "train_eps", "sample_eps")


def find_convention(
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    args: Mapping[str, Any],
    file: Path,
    given: Convention | None = None,
) -> Convention:
    """By what the file tells, or where it does not by `given`, which is --convention.

    content: what the file holds; weights: those of it; args: the settings of its run.
    Raises UserError for a model that predicts something else than a velocity, for a file that does not tell where
    nothing is given, and where it tells something else than is given.
    """
    refuse_other_predictions(args, file)
    told = _told(content, weights, args, file)
    if told is not None and given not in (None, told):
        raise UserError(f"--convention must be {told}, as {file} tells, got {given}")
    found = told or given
    if found is None:
        raise UserError(
            f"--convention must be given for {file}, which does not tell who trained it: repa (HASTE, REPA: t = 0 is "
            "data) or sit (SiT's own trainer: t = 1 is data). Weights of DiT, which predict noise, cannot be used"
        )
    return found


def refuse_other_predictions(args: Mapping[str, Any], file: Path) -> None:
    """UserError, by name, for what is trained to predict no velocity, or on another path."""
    model, prediction, path = (_text(args, name) for name in ("model", "prediction", "path_type"))
    if model.startswith("DiT"):
        raise UserError(f"{file} holds a {model}, which predicts noise; it must be a SiT, which predicts a velocity")
    if prediction not in ("", "v", *SIT_PREDICTIONS):
        raise UserError(f"{file} was trained with --prediction {prediction}; it must be velocity")
    if path not in ("", *SIT_PATHS, *SIT_PATHS.values()):
        raise UserError(f"{file} was trained with --path-type {path}; it must be Linear (linear) or GVP (cosine)")


def _told(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], args: Mapping[str, Any], file: Path
) -> Convention | None:
    if content.get("model_config") is not None or "steps" in content:  # SiT's trainer keeps no number of steps
        return "repa"
    if any(name in args for name in OF_SIT) or _text(args, "prediction") in SIT_PREDICTIONS:
        return "sit"
    if _text(args, "path_type") in SIT_PATHS:
        return "sit"
    if any(name in args for name in OF_REPA) or any(name.startswith("projectors.") for name in weights):
        return "repa"
    sigma = sigma_head(weights)
    if sigma is None:
        return None
    if file.name.startswith("DiT"):
        raise UserError(f"{file} holds a DiT, by its name, which predicts noise; it must be a SiT")
    # SiT's loss never reaches this half of the head, which begins as zeros; DiT's trains it.
    if not sigma.any():
        return "sit"
    if file.name.startswith("SiT"):
        logger.info("%s is taken for SiT's own, by its name", file)
        return "sit"
    return None


def sigma_head(weights: Mapping[str, Tensor]) -> Tensor | None:
    """The half of the output that learn_sigma adds, (patch², channels, width); None without it."""
    head, embed = weights.get("final_layer.linear.weight"), weights.get("x_embedder.proj.weight")
    if head is None or embed is None or head.dim() != 2 or embed.dim() != 4:
        return None
    _, channels, patch, _ = embed.shape
    if not channels * patch or len(head) != 2 * patch * patch * channels:
        return None
    return head.reshape(patch * patch, 2 * channels, -1)[:, channels:]


def our_settings(args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    """The settings of a run under our names. Of SiT's trainer those alone that mean here what they mean there."""
    if convention == "repa":
        return dict(args)
    same = {name: args[name] for name in ("model", "num_classes", "encoder_depth") if args.get(name) is not None}
    size = {"resolution": args["image_size"]} if args.get("image_size") is not None else {}
    path = _text(args, "path_type")
    return {**same, **size, "path_type": SIT_PATHS.get(path, path or "linear"), "prediction": "v"}


def _text(args: Mapping[str, Any], name: str) -> str:
    """A setting that is text, or nothing: another type is refused where all settings are."""
    value = args.get(name)
    return value if isinstance(value, str) else ""


def guided_channels(convention: Convention, channels: int) -> int | None:
    """How many channels, the first ones, the authors' sampler guides; None for all. SiT's is DiT's with its three."""
    return 3 if convention == "sit" and channels > 3 else None
