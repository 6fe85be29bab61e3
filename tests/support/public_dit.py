"""Checkpoints of a small DiT of latents, as DiT's trainer leaves them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from haste.models import DiT

NAME = "DiT-Tiny/2"
SHAPE = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}  # to be put among DiT's sizes by a test
REST = {"input_size": 4, "in_channels": 4, "num_classes": 10, "encoder_depth": 2}
ARGS = {"data_path": "/imagenet/train", "results_dir": "results", "model": "DiT-XL/2", "image_size": 32,
        "num_classes": 10, "epochs": 1400, "global_batch_size": 256, "global_seed": 0, "vae": "ema", "num_workers": 4,
        "log_every": 100, "ckpt_every": 50_000}  # fmt: skip


def random_dit(seed: int = 0, **changes: Any) -> DiT:
    """One in which no trained parameter is zero, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(**{**SHAPE, **REST, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def public_file(**args: Any) -> dict[str, Any]:
    """{model, ema, opt, args} with EMA weights unlike the trained ones; None leaves a setting out."""
    settings = {name: value for name, value in {**ARGS, **args}.items() if value is not None}
    model = random_dit()
    return {
        "model": model.state_dict(), "ema": random_dit(1).state_dict(),
        "opt": torch.optim.AdamW(model.parameters(), lr=1e-4).state_dict(), "args": argparse.Namespace(**settings),
    }  # fmt: skip


def without_sigma(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model that predicts noise alone."""
    head = {name: value for name, value in weights.items() if name.startswith("final_layer.linear.")}
    half = {name: value.unflatten(0, (4, 2, 4))[:, 0].flatten(0, 1).clone() for name, value in head.items()}
    return {**weights, **half}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
