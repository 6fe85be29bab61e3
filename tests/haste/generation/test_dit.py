"""DiT through the sampler of commands: what --mode, --timestep-spacing and --guided-channels do."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import pytest
import torch
from haste.errors import UserError
from haste.generation import load_checkpoint
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler, fit_to_family
from haste.models import DiT
from haste.samplers import sample
from haste.vae import LatentFormat
from image_files import save_vae

CONFIG = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "input_size": 4, "in_channels": 4,
          "num_classes": 10}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a DiT of latents with weights at which everything matters."""
    folder = tmp_path_factory.mktemp("run")
    generator, model = torch.Generator().manual_seed(0), DiT(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    weights, latents = model.state_dict(), asdict(LatentFormat.of(str(save_vae(folder / "vae"))))
    content = {"model": weights, "ema": weights, "opt": {}, "steps": 0, "model_config": {"family": "dit", **CONFIG}}
    args = argparse.Namespace(preset="", model="DiT-S/2", prediction="noise", path_type="linear")
    torch.save({**content, "args": args, "latents": latents}, folder / "0000100.pt")
    return load_checkpoint(folder / "0000100.pt", device="cpu")


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"num_steps": 4}, {"num_steps": 4, "sampler": "ddim"}),
        ({"num_steps": 4, "mode": "ddpm"}, {"num_steps": 4, "sampler": "ddpm"}),
        ({"num_steps": 5, "timestep_spacing": "leading"}, {"num_steps": 5, "timestep_spacing": "leading"}),
        ({"num_steps": 4, "cfg_scale": 2.0}, {"num_steps": 4, "cfg_scale": 2.0, "null": 10, "guided_channels": 3}),
        (
            {"num_steps": 4, "mode": "ddpm", "cfg_scale": 2.0, "guided_channels": 4, "guidance_high": 0.5},
            {"num_steps": 4, "sampler": "ddpm", "cfg_scale": 2.0, "null": 10, "guidance_high": 0.5},
        ),
    ],
)
def test_flags_are_the_arguments_of_the_sampler(checkpoint, settings, arguments):
    sampler = Sampler(checkpoint, SamplingConfig(**settings))
    start, again = sampler.start_of(range(3)), sampler.start_of(range(3))
    expected = sample(checkpoint.model, again.noise, again.condition, generator=again.generators, **arguments)
    assert torch.equal(sampler.run(start), expected)


def test_the_number_of_calls_is_counted(checkpoint):
    sampler = Sampler(
        checkpoint, SamplingConfig(num_steps=5, cfg_scale=2.0, guidance_mode="separate", guidance_low=0.5)
    )
    sampler.sample(range(2))
    assert sampler.calls == (8, 8)  # guided in three of five steps, at shares 1, 0.75 and 0.5


def test_a_warm_up_calls_at_times_of_the_model(checkpoint):
    for settings in ({}, {"cache": "newton", "granularity": "model"}):
        Sampler(checkpoint, SamplingConfig(num_steps=8, **settings)).warm_up(2)


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        ({}, "ddim-50-cfg1-seed0", "50 DDIM steps"),
        ({"mode": "ddpm", "num_steps": 250}, "ddpm-250-cfg1-seed0", "250 DDPM steps"),
        ({"timestep_spacing": "trailing"}, "ddim-50-trailing-cfg1-seed0", "50 DDIM steps, trailing times"),
        (
            {"cfg_scale": 4.0, "guided_channels": 4},
            "ddim-50-cfg4-guided4-seed0",
            "50 DDIM steps, guidance 4 of 4 channels",
        ),
    ],
)
def test_the_sampler_is_named(checkpoint, settings, name, words):
    fitted = fit_to_family(SamplingConfig(**settings), checkpoint)
    assert (fitted.short_name(), fitted.describe()) == (name, words)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "sde"}, "--mode must be ddim or ddpm for this DiT, which predicts noise, got sde"),
        ({"mode": "ode"}, "--mode must be ddim or ddpm for this DiT, which predicts noise, got ode"),
        ({"heun": True}, "--heun must be left out for this DiT, which predicts noise, got --heun"),
        ({"num_steps": 1001}, "--num-steps must be at most 1000, the times of DiT, got 1001"),
        (
            {"num_steps": 30, "timestep_spacing": "leading"},
            "--num-steps must divide 1000 with --timestep-spacing leading, got 30; linspace takes any number",
        ),
        ({"time_shift": 2.0}, "--time-shift must be left out for this DiT, which predicts noise, got 2"),
        ({"guided_channels": 5}, "--guided-channels must be from 1 to 4, the channels of the model, got 5"),
    ],
)
def test_settings_of_other_models_are_refused(checkpoint, settings, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        Sampler(checkpoint, SamplingConfig(**settings))
