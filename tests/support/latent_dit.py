"""Checkpoints of a small DiT of latents with a VAE that diffusers' DiTPipeline can use."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from haste.models import DiT
from haste.vae import LatentFormat

# Wide enough for diffusers' frequencies to embed the times of short runs as DiT does.
SHAPE = {"depth": 2, "hidden_size": 128, "num_heads": 4, "patch_size": 2, "input_size": 4, "in_channels": 4,
         "num_classes": 3, "class_dropout_prob": 0.1}  # fmt: skip
CLASSES = ["red fox, Vulpes vulpes", "umbrella", "tench"]


def save_unshifted_vae(folder: Path, **changes) -> Path:
    """A random AutoencoderKL that makes one latent of 2 x 2 pixels, and does not shift them."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, **{"scaling_factor": 0.5, **changes},
    ).save_pretrained(folder)  # fmt: skip
    return folder


def random_dit(dtype: torch.dtype = torch.float32, **changes) -> DiT:
    """In which every parameter matters."""
    generator, model = torch.Generator().manual_seed(0), DiT(**{**SHAPE, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def write_dit(folder: Path, latents: dict | None = None, **changes) -> Path:
    """As `haste train` leaves it, beside its VAE; its averaged weights are twice the trained ones."""
    vae = asdict(LatentFormat.of(str(save_unshifted_vae(folder / "vae")))) if latents is None else latents
    model = random_dit(**changes)
    weights = model.state_dict()
    averaged = {name: value if name == "pos_embed" else 2 * value for name, value in weights.items()}
    config = {"family": "dit", **SHAPE, **changes}
    args = argparse.Namespace(preset="", model="DiT-S/2", prediction="noise", path_type="linear", exp_name="foxes")
    content = {"model": weights, "ema": averaged, "opt": {}, "steps": 100, "model_config": config, "args": args}
    torch.save({**content, "latents": vae or None, "class_names": CLASSES}, folder / "0000100.pt")
    return folder / "0000100.pt"
