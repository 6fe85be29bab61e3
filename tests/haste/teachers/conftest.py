"""Small random encoders of every family, saved to disk as a user's folder would be."""

from __future__ import annotations

from pathlib import Path

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


def _mae() -> tf.PreTrainedModel:
    return tf.ViTMAEModel(tf.ViTMAEConfig(**COMMON))


def _ijepa() -> tf.PreTrainedModel:
    return tf.IJepaModel(tf.IJepaConfig(**COMMON))


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
    "mae": (_mae, 1),
    "ijepa": (_ijepa, 0),
}


@pytest.fixture(scope="session", params=FAMILIES)
def saved_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(folder, prefix tokens) of one family: 3 layers of 3 heads, width 24, 4 x 4 patches of 4 pixels."""
    build, prefix = FAMILIES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    build().save_pretrained(folder)
    return folder, prefix


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2-only")
    _dinov2().save_pretrained(folder)
    return folder
