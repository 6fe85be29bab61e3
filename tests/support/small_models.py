"""A SiT and a DINOv2 teacher of a size at which a test takes milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from haste.models import SiT
from transformers import Dinov2Config, Dinov2Model

SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2,
    "num_classes": 10, "encoder_depth": 2,
}  # fmt: skip
WITH_PROJECTORS = {"z_dims": (6,), "projector_dim": 8}


def random_sit(**changes) -> SiT:
    """A SiT of SHAPE in which no trained parameter is zero, so that each of them matters."""
    torch.manual_seed(0)
    model = SiT(**{**SHAPE, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_teacher(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a DINOv2 with random weights for images of 8 x 8 pixels; returns the folder."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    Dinov2Model(Dinov2Config(**{**shape, "num_channels": 1, **changes})).save_pretrained(folder)
    return folder
