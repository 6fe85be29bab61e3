"""Checkpoints of a small SiT that draws latents: ours, and as other trainers leave them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from haste.models import SiT
from haste.vae import LatentFormat
from image_files import save_vae

NAME = "SiT-XL/2"  # that tests give to this shape, so that published commands run as they are
SHAPE = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
REST = {"input_size": 4, "in_channels": 4, "num_classes": 10, "encoder_depth": 2}
IMAGE = 16  # pixels per side, with the VAE of `save_vae`


def random_weights(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """Of a size at which everything matters, with one projector onto 6 features."""
    generator = torch.Generator().manual_seed(seed)
    model = SiT(**{**SHAPE, **REST, "z_dims": (6,), "projector_dim": 8, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def write_ours(path: Path, vae: Path, **args) -> Path:
    """With the format of its latents, as `haste train` leaves it."""
    latents = asdict(LatentFormat.of(str(save_vae(vae))))
    weights = random_weights()
    content = {"model": weights, "ema": weights, "opt": {}, "steps": 0, "model_config": {**SHAPE, **REST}}
    settings = {"encoder_depth": 2, "path_type": "linear", **args}
    return save(path, {**content, "args": argparse.Namespace(**settings), "latents": latents})


def write_repas(path: Path, weights: dict[str, torch.Tensor] | None = None, **args) -> Path:
    """As REPA's trainer leaves it, with these settings of its run."""
    weights = random_weights() if weights is None else weights
    settings = {"encoder_depth": 2, "num_classes": 10, "path_type": "linear", "resolution": IMAGE, **args}
    content = {"model": weights, "ema": weights, "opt": {}, "steps": 0}
    return save(path, {**content, "args": argparse.Namespace(**settings)})


def write_bare(path: Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """A file of averaged weights that tells nothing about its run."""
    return save(path, {"ema": random_weights() if weights is None else weights})


def save(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
