"""Checkpoints of SiT's other trainers: whose conventions a file keeps, and its weights in ours.

- repa: HASTE, REPA and this trainer. t = 0 is data, the velocity is ε − x.
- sit: SiT's own trainer. t = 1 is data, the velocity is x − ε. Its sampler guides three of four channels.

DiT predicts noise, with weights of the same names and shapes as SiT's; such a file is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste.errors import UserError
from haste.models.family import Convention, ForeignCheckpoints, Weights
from haste.models.layers import TimestepEmbedder

logger = logging.getLogger(__name__)

PATHS = {"Linear": "linear", "GVP": "cosine"}  # SiT's names of --path-type, and ours
VELOCITY = ("v", "velocity")  # REPA's name and SiT's

# Settings that only REPA's and HASTE's trainers record, and those that only SiT's records.
OF_REPA = ("enc_type", "proj_coeff", "attn_coeff", "encoder_depth", "projector_embed_dims")
OF_SIT = ("loss_weight", "train_eps", "sample_eps")

HEAD, EMBEDDER, TIMES = "final_layer.linear", "x_embedder.proj.weight", "t_embedder.mlp.0.weight"


class SiTCheckpoints(ForeignCheckpoints):
    """Files of HASTE, REPA and SiT."""

    def rename(self, weights: Mapping[str, Tensor]) -> Weights:
        """REPA's first checkpoints count the blocks after the projectors from 0 again, as decoder_blocks."""
        old = "decoder_blocks."
        numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        before = sum(number.isdecimal() for number in numbers)

        def rename(name: str) -> str:
            number, _, rest = name.removeprefix(old).partition(".")
            return f"blocks.{int(number) + before}.{rest}" if name.startswith(old) and number.isdecimal() else name

        return {rename(name): value for name, value in weights.items()}

    def check_settings(self, args: Mapping[str, Any], file: Path) -> None:
        model, prediction, path = (_text(args, name) for name in ("model", "prediction", "path_type"))
        if model.startswith("DiT"):
            raise UserError(f"{file} must be a SiT's checkpoint, got a {model}, which predicts noise")
        if prediction not in ("", *VELOCITY):
            raise UserError(f"{file} must be trained with --prediction velocity, got --prediction {prediction}")
        if path not in ("", *PATHS, *PATHS.values()):
            raise UserError(
                f"{file} must be trained with --path-type Linear (linear) or GVP (cosine), got --path-type {path}"
            )

    def find_convention(
        self,
        content: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        args: Mapping[str, Any],
        file: Path,
        given: Convention | None = None,
    ) -> Convention:
        self.check_settings(args, file)
        stated = _stated_convention(content, weights, args, file)
        if stated is not None and given not in (None, stated):
            raise UserError(f"--convention must be {stated}, by the content of {file}, got {given}")
        found = stated or given
        if found is None:
            raise UserError(
                f"--convention must be given for {file}, whose content does not show who trained it: repa (HASTE, "
                "REPA: t = 0 is data) or sit (SiT's own trainer: t = 1 is data). Weights of DiT, which predict noise, "
                "cannot be used"
            )
        return found

    def convert_weights(self, weights: Mapping[str, Tensor], convention: Convention) -> Weights:
        """SiT's f(x, s) predicts x₀ − ε at time s = 1 − t. So v(x, t) = −f(x, 1 − t):
        the head changes its sign and loses the half that predicts sigma, and the time embedding takes in that
        cos((1−t)ω) = cos ω·cos tω + sin ω·sin tω  and  sin((1−t)ω) = sin ω·cos tω − cos ω·sin tω.

        A weight of an unexpected shape is left as it is.
        """
        converted = dict(weights)
        if convention == "repa":
            return converted
        learns_sigma = sigma_head(weights) is not None
        for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
            if name in weights:
                value = weights[name]
                converted[name] = -(_velocity_half(value, weights[EMBEDDER]) if learns_sigma else value)
        if TIMES in weights and weights[TIMES].dim() == 2 and not weights[TIMES].shape[1] % 2:
            of_cos, of_sin = weights[TIMES].double().chunk(2, dim=1)
            embedder = TimestepEmbedder(1, num_frequencies=weights[TIMES].shape[1])
            cos, sin = embedder.frequencies(torch.ones(1, dtype=torch.float64)).chunk(2, dim=1)
            turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
            converted[TIMES] = turned.to(weights[TIMES].dtype)
        return converted

    def convert_settings(self, args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
        """Of SiT's trainer only the settings that mean the same here."""
        if convention == "repa":
            return dict(args)
        same = {name: args[name] for name in ("model", "num_classes", "encoder_depth") if args.get(name) is not None}
        size = {"resolution": args["image_size"]} if args.get("image_size") is not None else {}
        path = _text(args, "path_type")
        return {**same, **size, "path_type": PATHS.get(path, path or "linear"), "prediction": "v"}

    def guided_channels(self, convention: Convention, channels: int) -> int | None:
        """SiT's sampler guides three of four channels, as DiT's does."""
        return 3 if convention == "sit" and channels > 3 else None


def _stated_convention(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], args: Mapping[str, Any], file: Path
) -> Convention | None:
    """The convention that follows from the content of a file; None if it shows none."""
    if content.get("model_config") is not None or "steps" in content:  # SiT's trainer keeps no number of steps
        return "repa"
    if any(name in args for name in OF_SIT) or _text(args, "prediction") == "velocity":
        return "sit"
    if _text(args, "path_type") in PATHS:
        return "sit"
    if any(name in args for name in OF_REPA) or any(name.startswith("projectors.") for name in weights):
        return "repa"
    sigma = sigma_head(weights)
    if sigma is None:
        return None
    if file.name.startswith("DiT"):
        raise UserError(f"{file} must be a SiT's checkpoint, got a DiT, by its name, which predicts noise")
    # SiT's loss never reaches this half of the head, which begins as zeros; DiT's trains it.
    if not sigma.any():
        return "sit"
    if file.name.startswith("SiT"):
        logger.info("%s is taken for SiT's own, by its name", file)
        return "sit"
    return None


def _text(args: Mapping[str, Any], name: str) -> str:
    """A setting that is text; empty for another type, which is refused where all settings are checked."""
    value = args.get(name)
    return value if isinstance(value, str) else ""


def sigma_head(weights: Mapping[str, Tensor]) -> Tensor | None:
    """The half of the output that learn_sigma adds, (patch², channels, width); None without it."""
    head, embed = weights.get(f"{HEAD}.weight"), weights.get(EMBEDDER)
    if head is None or embed is None or head.dim() != 2 or embed.dim() != 4:
        return None
    _, channels, patch, _ = embed.shape
    if not channels * patch or len(head) != 2 * patch * patch * channels:
        return None
    return head.reshape(patch * patch, 2 * channels, -1)[:, channels:]


def _velocity_half(value: Tensor, embedder: Tensor) -> Tensor:
    """The rows of a head's weight or bias that predict the velocity; unchanged if it does not have the rows of both."""
    _, channels, patch, _ = embedder.shape
    area = patch * patch
    if not value.dim() or len(value) != 2 * area * channels:
        return value
    return value.reshape(area, 2 * channels, *value.shape[1:])[:, :channels].reshape(area * channels, *value.shape[1:])
