"""Small random encoders of every family, saved to disk as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers as tf

COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}
NAFLEX = {**{key: value for key, value in COMMON.items() if key != "image_size"}, "num_patches": 16}


def _vit() -> tf.PreTrainedModel:
    return tf.ViTModel(tf.ViTConfig(**COMMON))


def _deit() -> tf.PreTrainedModel:
    return tf.DeiTModel(tf.DeiTConfig(**COMMON))


def _dinov2() -> tf.PreTrainedModel:
    return tf.Dinov2Model(tf.Dinov2Config(**COMMON))


def _dinov2_with_registers() -> tf.PreTrainedModel:
    return tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**COMMON, num_register_tokens=4))


def _dinov3() -> tf.PreTrainedModel:
    return tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**COMMON, num_register_tokens=4))


def _clip() -> tf.PreTrainedModel:
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=COMMON))


def _clip_vision() -> tf.PreTrainedModel:
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**COMMON))


def _siglip() -> tf.PreTrainedModel:
    return tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=COMMON))


def _siglip2_naflex() -> tf.PreTrainedModel:
    return tf.Siglip2Model(tf.Siglip2Config(text_config=TEXT, vision_config=NAFLEX))


def _mae() -> tf.PreTrainedModel:
    return tf.ViTMAEModel(tf.ViTMAEConfig(**COMMON))


def _ijepa() -> tf.PreTrainedModel:
    return tf.IJepaModel(tf.IJepaConfig(**COMMON))


def _radio() -> tf.PreTrainedModel:
    shape = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
    return tf.RadioModel(tf.RadioConfig(**shape, mlp_ratio=1.5, num_cls_tokens=2, num_registers=3, max_img_size=32))


# family: how to build it, and how many prefix tokens it has
FAMILIES = {
    "vit": (_vit, 1),
    "deit": (_deit, 2),
    "dinov2": (_dinov2, 1),
    "dinov2_with_registers": (_dinov2_with_registers, 5),
    "dinov3": (_dinov3, 5),
    "clip": (_clip, 1),
    "clip_vision": (_clip_vision, 1),
    "siglip": (_siglip, 0),
    "siglip2_naflex": (_siglip2_naflex, 0),
    "mae": (_mae, 1),
    "ijepa": (_ijepa, 0),
    "radio": (_radio, 5),
}


class Saved(NamedTuple):
    """A folder and what is known of the encoder in it: 3 layers of 3 heads, width 24, 4 x 4 patches of 4 pixels."""

    name: str
    folder: Path
    prefix: int


def save(name: str, folder: Path) -> Saved:
    """No parameter is left at 0 or 1, where transformers starts positions, class tokens, biases and norms."""
    build, prefix = FAMILIES[name]
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    model.save_pretrained(folder)
    return Saved(name, folder, prefix)


@pytest.fixture(scope="session", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("dinov2", tmp_path_factory.mktemp("dinov2-only")).folder
