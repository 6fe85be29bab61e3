"""Images of a model that denoises a class token: sampled by haste's commands and functions, guided apart, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.generation.config import SampleConfig, SamplingConfig
from haste.generation.loaded import LoadedCheckpoint
from haste.generation.pipeline import Sampler
from haste.models import build_model
from haste.training.config import TrainConfig

CONFIG = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2,
    "num_classes": 10, "encoder_depth": 1, "projector_dim": 8,
}  # fmt: skip


def loaded(tmp_path, **config) -> LoadedCheckpoint:
    """A checkpoint of pixels with random weights."""
    torch.manual_seed(0)
    config = {**CONFIG, **config}
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    settings = TrainConfig(exp_name="run", data_dir="digits", resolution=8)
    return LoadedCheckpoint(model.eval(), config, settings, tmp_path / "0000001.pt", {"latents": None})


@pytest.fixture
def checkpoint(tmp_path) -> LoadedCheckpoint:
    return loaded(tmp_path, cls_token_dim=6)


def images(checkpoint, indices=range(4), **settings) -> np.ndarray:
    sampler = Sampler(checkpoint, SamplingConfig(num_steps=4, **settings))
    sampler.warm_up(2)
    return sampler.sample(list(indices))[0]


@pytest.mark.parametrize("settings", [{}, {"mode": "sde"}, {"heun": True, "cfg_scale": 2.0}])
def test_an_image_depends_on_its_number_alone(checkpoint, settings):
    together = images(checkpoint, **settings)
    alone = images(checkpoint, [2], **settings)
    assert together.shape == (4, 8, 8, 3) and together.std() > 1
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1


def test_the_class_token_has_a_scale_of_its_own(checkpoint):
    """0 is REG's way to leave it unguided, and the default is the image's own."""
    usual = images(checkpoint, cfg_scale=3.0)
    assert (usual == images(checkpoint, cfg_scale=3.0, cls_cfg_scale=3.0)).mean() > 0.99
    unguided = images(checkpoint, cfg_scale=3.0, cls_cfg_scale=0.0)
    assert (unguided == images(checkpoint, cfg_scale=3.0, cls_cfg_scale=1.0)).all()
    assert (unguided != usual).any() and (unguided != images(checkpoint)).any()
    settings = SamplingConfig(cfg_scale=3.0, cls_cfg_scale=1.5)
    assert settings.sampling_fields()["cls_cfg_scale"] == 1.5 and "cls1.5" in settings.short_name()
    assert "cls_cfg_scale" not in SamplingConfig(cfg_scale=3.0).sampling_fields()


@pytest.mark.parametrize("granularity", ["module", "output"])
def test_forecasts(checkpoint, granularity):
    cache = {"cache": "taylor", "granularity": granularity, "interval": 2, "order": 1, "first_enhance": 1}
    cached = Sampler(checkpoint, SamplingConfig(num_steps=6, **cache))
    assert cached.sample([0, 1])[0].shape == (2, 8, 8, 3) and cached.calls[1] < cached.calls[0]


def test_settings_of_other_models_are_refused_by_name(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--cls-cfg-scale must be left out for this SiT"):
        images(loaded(tmp_path), cfg_scale=2.0, cls_cfg_scale=2.0)
    with pytest.raises(UserError, match="--guided-channels must be left out for this SiT"):
        images(checkpoint, cfg_scale=2.0, guided_channels=1)
    with pytest.raises(UserError, match="--cls-cfg-scale must come with --cfg-scale above 1"):
        images(checkpoint, cls_cfg_scale=2.0)
    with pytest.raises(UserError, match="--cls must be 6, as in the checkpoint, got 768"):
        SampleConfig(ckpt=tmp_path, cls=768).refuse_other(checkpoint, 1)
    SampleConfig(ckpt=tmp_path, cls=6).refuse_other(checkpoint, 1)
