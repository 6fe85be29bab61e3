"""Checkpoints of SiT's trainers, LightningDiT's and DiT's: whose convention a file has, and SiT's weights in ours.

- repa: HASTE, REPA and this trainer. t = 0 is data, the velocity is ε − x.
- sit: SiT's own trainer, and LightningDiT's. t = 1 is data, the velocity is x − ε. Their samplers guide three channels.
- dit: DiT predicts noise and variance, with weights of the names and shapes of SiT's with learn_sigma
  (`haste.models.dit_checkpoints`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from haste.errors import UserError
from haste.models.family import CheckpointFile, Convention, ForeignCheckpoints, Weights
from haste.models.layers import TimestepEmbedder

NAMES = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight")  # that tell the sizes

TRAINERS = {
    "repa": "HASTE or REPA: t = 0 is data",
    "sit": "SiT's own trainer, or LightningDiT's: t = 1 is data",
    "dit": "DiT's trainer: the model predicts noise and variance",
}

PATHS = {"Linear": "linear", "GVP": "cosine"}  # SiT's names of --path-type, and ours
VELOCITY = ("v", "velocity")  # REPA's name and SiT's

CONVOLUTION = "projectors.0.projection_layer.weight"  # of iREPA's projector

# Settings that only REPA's and HASTE's trainers record, and those that only SiT's records.
OF_REPA = ("enc_type", "proj_coeff", "attn_coeff", "encoder_depth", "projector_embed_dims")
OF_SIT = ("loss_weight", "train_eps", "sample_eps")

HEAD, EMBEDDER, TIMES = "final_layer.linear", "x_embedder.proj.weight", "t_embedder.mlp.0.weight"


class SiTCheckpoints(ForeignCheckpoints):
    """Files of HASTE, REPA, SiT and LightningDiT."""

    def rename(self, weights: Mapping[str, Tensor]) -> Weights:
        """REPA's first checkpoints count the blocks after the projectors from 0 again, as decoder_blocks; iREPA's have
        REPA's projectors one level deeper, and SRA's a head of another name."""
        old = "decoder_blocks."
        numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        before = sum(number.isdecimal() for number in numbers)

        def rename(name: str) -> str:
            name = re.sub(r"^ap_head\.linear([12])(?=\.)", lambda found: f"projectors.0.{2 * int(found[1]) - 2}", name)
            name = re.sub(r"^(projectors\.\d+)\.projection_layer(?=\.\d)", r"\1", name)
            number, _, rest = name.removeprefix(old).partition(".")
            return f"blocks.{int(number) + before}.{rest}" if name.startswith(old) and number.isdecimal() else name

        return {rename(name): value for name, value in weights.items()}

    def find_convention(self, file: CheckpointFile) -> Convention | None:
        found = find_convention(file)
        if found == "dit":
            return None
        if file.content.get("model_config") is None:
            _check_settings(file)
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
        if "model_type" in args:  # LightningDiT's
            same["model"] = args["model_type"]
        size = {"resolution": args["image_size"]} if args.get("image_size") is not None else {}
        path = text_of(args, "path_type")
        return {**same, **size, "path_type": PATHS.get(path, path or "linear"), "prediction": "v"}

    def guided_channels(self, convention: Convention, channels: int) -> int | None:
        """SiT's sampler guides three of four channels, as DiT's does, and LightningDiT's three of 32."""
        return 3 if convention == "sit" and channels > 3 else None


def find_convention(file: CheckpointFile) -> Convention | None:
    """The convention of a file of SiT's or DiT's; None of other weights.

    Raises:
        UserError: as `ForeignCheckpoints.find_convention`.
    """
    config, given = file.content.get("model_config"), file.convention
    if config is None and not all(name in file.weights for name in NAMES):
        return None
    found, how = _by_content(file), "content"
    if found is None:
        found, how = _by_name(file), "name"
    model = text_of(file.args, "model")
    if found is None and given == "dit" and model.startswith("SiT"):
        raise UserError(f"--convention must be repa or sit for {file.path}, of a {model}, got dit")
    if found is not None and given not in (None, found):
        raise UserError(f"--convention must be {found} ({TRAINERS[found]}), by the {how} of {file.path}, got {given}")
    if found is None and given is None:
        known = "; ".join(f"{name} ({trainer})" for name, trainer in TRAINERS.items())
        raise UserError(f"--convention must be given for {file.path}, which does not show who trained it: {known}")
    return found or given


def _by_content(file: CheckpointFile) -> Convention | None:
    """The convention that follows from the content of a file; None if it shows none."""
    config, args = file.content.get("model_config"), file.args
    if config is not None:
        return "dit" if isinstance(config, Mapping) and config.get("family") == "dit" else "repa"
    if text_of(args, "model").startswith("DiT"):
        return "dit"
    if "steps" in file.content:  # SiT's trainer keeps no number of steps
        return "repa"
    if any(name in args for name in OF_SIT) or text_of(args, "prediction") == "velocity":
        return "sit"
    if text_of(args, "path_type") in PATHS:
        return "sit"
    if any(name in args for name in OF_REPA) or any(name.startswith("projectors.") for name in file.weights):
        return "repa"
    sigma = sigma_head(file.weights)
    # SiT's loss never reaches this half of the head, which begins as zeros; DiT's trains it. Where all is zeros nothing
    # has been trained.
    untrained = sigma is not None and not sigma.any() and bool(file.weights[f"{HEAD}.weight"].any())
    return "sit" if untrained and not file.path.name.startswith("DiT") else None


def _by_name(file: CheckpointFile) -> Convention | None:
    """The convention by the name of the file, as its authors call it; None by another."""
    name, sigma = file.path.name, sigma_head(file.weights)
    if name.lower().startswith("lightningdit"):
        return "sit"
    if sigma is None:  # which DiT refuses, unless it is said to be another's
        return "dit" if name.startswith("DiT") and file.convention is None else None
    if name.startswith("DiT") and sigma.any():  # else the content is SiT's, and it may be either
        return "dit"
    if name.startswith("SiT"):
        return "sit"
    return None


def _check_settings(file: CheckpointFile) -> None:
    """Raise UserError if a run with these settings trained a model of no velocity, or of a path that is not known."""
    prediction, path = (text_of(file.args, name) for name in ("prediction", "path_type"))
    if prediction not in ("", *VELOCITY):
        raise UserError(f"{file.path} must be trained with --prediction velocity, got --prediction {prediction}")
    if path not in ("", *PATHS, *PATHS.values()):
        raise UserError(
            f"{file.path} must be trained with --path-type Linear (linear) or GVP (cosine), got --path-type {path}"
        )


def text_of(args: Mapping[str, Any], name: str) -> str:
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
