"""Checkpoints of DiT: bare weights as published, and {model, ema, opt, args} of its trainer.

Their names and shapes are those of a SiT with learn_sigma: `haste.models.sit_checkpoints` tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haste.errors import UserError
from haste.models.family import CheckpointFile, Convention, ForeignCheckpoints
from haste.models.sit_checkpoints import EMBEDDER, HEAD, find_convention, sigma_head, text_of
from haste.validation import shown

SAME = {"model": "model", "num_classes": "num_classes", "image_size": "resolution", "vae": "vae"}
"""The settings of DiT's trainer that mean the same here, and their names."""

ONLY = {"diffusion_steps": 1000, "noise_schedule": "linear", "learn_sigma": True, "predict_xstart": False}
"""Settings of DiT's descendants that DiT's trainer does not have, and the values that make the same model."""


class DiTCheckpoints(ForeignCheckpoints):
    """Files of DiT, whose weights have the names that `haste.models.DiT` has."""

    def find_convention(self, file: CheckpointFile) -> Convention | None:
        if find_convention(file) != "dit":
            return None
        if file.content.get("model_config") is None:
            _check_settings(file)
            _check_head(file)
        return "dit"

    def convert_settings(self, args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
        """Of DiT's trainer only the settings that mean the same here."""
        if "preset" in args:  # a run of haste
            return dict(args)
        same = {ours: args[name] for name, ours in SAME.items() if args.get(name) is not None}
        return {**same, "prediction": "noise"}

    def guided_channels(self, convention: Convention, channels: int) -> int | None:
        """DiT's sampler guides the noise of three of four channels, and never the variance."""
        return 3 if channels > 3 else None


def _check_settings(file: CheckpointFile) -> None:
    """Raise UserError if a run with these settings trained no model of DiT's noise and variance."""
    path = text_of(file.args, "path_type")
    if path:
        raise UserError(f"{file.path} must be of a DiT, which predicts noise and has no path, got --path-type {path}")
    for name, only in ONLY.items():
        given = file.args.get(name)
        if given is not None and (type(given) is not type(only) or given != only):
            raise UserError(
                f"{file.path} must be trained with --{name.replace('_', '-')} {only}, as DiT, got {shown(given)}"
            )


def _check_head(file: CheckpointFile) -> None:
    """Raise UserError for a model that predicts noise alone."""
    head, embedder = file.weights.get(f"{HEAD}.weight"), file.weights[EMBEDDER]
    if head is None or head.dim() != 2 or embedder.dim() != 4 or sigma_head(file.weights) is not None:
        return  # what is wrong besides is told where names and shapes are compared
    _, channels, patch, _ = embedder.shape
    if len(head) == patch * patch * channels:
        raise UserError(f"{file.path} must be of a DiT with learn_sigma, which predicts a variance beside the noise, "
                        f"got {HEAD} of {len(head)} outputs, not {2 * len(head)}")  # fmt: skip
