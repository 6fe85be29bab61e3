"""Latents and images by a tiny random AutoencoderKL that was saved to disk."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from haste import io
from haste.errors import UserError
from haste.vae import PUBLISHED_VAES, SD_LATENTS, VAE, LatentFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import cut_short, save_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


def changed_config(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def moments_of(mean: list[float], std: list[float]) -> torch.Tensor:
    return torch.tensor([*mean, *std]).view(1, -1, 1, 1).expand(2, -1, 50, 50).contiguous()


def test_the_format_of_a_folder_comes_from_its_config(folder, tmp_path):
    latents = LatentFormat.of(str(folder))
    assert latents == LatentFormat(str(folder), 4, 4, (0.25,) * 4, (0.5,) * 4)
    assert latents.input_size(24) == 6
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    assert LatentFormat.of(str(tmp_path / "pipeline")).factor == 4


def test_stable_diffusions_are_known_without_a_download(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("nothing is asked of the hub")

    monkeypatch.setattr(AutoencoderKL, "load_config", fail)
    assert LatentFormat.of("mse") == SD_LATENTS
    assert LatentFormat.of("ema") == replace(SD_LATENTS, vae=PUBLISHED_VAES["ema"])
    assert (SD_LATENTS.channels, SD_LATENTS.factor, SD_LATENTS.scale[0]) == (4, 8, 0.18215)


def test_the_mean_and_deviation_of_a_config_go_channel_by_channel(folder, tmp_path):
    path = changed_config(folder, tmp_path / "x", latents_mean=[1, 2, 3, 4], latents_std=[1, 2, 4, 8], scaling_factor=2)
    latents = LatentFormat.of(str(path))
    assert latents.shift == (1, 2, 3, 4) and latents.scale == (2, 1, 0.5, 0.25)


def test_what_is_diffused_is_drawn_from_the_moments_shifted_and_scaled():
    latents = LatentFormat("", 2, 8, shift=(1.0, -1.0), scale=(0.5, 4.0))
    drawn = latents.sample_posterior(moments_of([3.0, 0.0], [2.0, 0.25]), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 2, 50, 50)
    for channel, (mean, std) in enumerate([(1.0, 1.0), (4.0, 1.0)]):
        assert drawn[:, channel].mean().item() == pytest.approx(mean, abs=0.05)
        assert drawn[:, channel].std().item() == pytest.approx(std, abs=0.05)
    certain = moments_of([3.0, 0.0], [0.0, 0.0])
    torch.testing.assert_close(latents.restore(latents.sample_posterior(certain)), certain[:, :2])


def test_draws_differ_and_repeat_with_their_generator():
    moments = moments_of([0.0] * 4, [1.0] * 4)
    draws = [SD_LATENTS.sample_posterior(moments, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_encoding_and_decoding_are_the_autoencoders_own(folder):
    vae, original = VAE(LatentFormat.of(str(folder))), AutoencoderKL.from_pretrained(folder).eval()
    images = torch.rand(20, 3, 16, 16) * 2 - 1  # more than go through it at a time
    distribution = original.encode(images).latent_dist
    moments = vae.encode(images)
    torch.testing.assert_close(moments, torch.cat([distribution.mean, distribution.std], dim=1))
    x = (distribution.mean - 0.25) * 0.5
    torch.testing.assert_close(vae.decode(x), original.decode(distribution.mean).sample.clamp(-1, 1))
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert not vae.train().training


def test_the_format_survives_json(folder):
    latents = LatentFormat.of(str(folder))
    assert LatentFormat.from_dict(json.loads(json.dumps(asdict(latents)))) == latents


# ---- statistics ----


@pytest.mark.parametrize(
    "content",
    [
        {"latents_bias": torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1), "latents_scale": torch.full((4,), 0.25)},
        {"mean": torch.tensor([1.0, 2.0, 3.0, 4.0]), "std": torch.full((1, 4, 1, 1), 4.0)},
    ],
)
def test_a_file_of_statistics_replaces_shift_and_scale(folder, tmp_path, content):
    path = str(tmp_path / "stats.pt")
    torch.save(content, path)
    for latents in (LatentFormat.of(str(folder), path), LatentFormat.of("mse", path)):
        assert latents.shift == (1, 2, 3, 4) and latents.scale == (0.25,) * 4


def test_files_that_are_no_statistics_are_refused(folder, tmp_path):
    path = tmp_path / "stats.pt"
    for content, sentence in [
        ({"mean": torch.zeros(4)}, "must hold the tensors latents_scale and latents_bias, or mean and std"),
        ([1, 2], "must hold the tensors"),
        ({"mean": torch.zeros(16), "std": torch.ones(16)}, "must be for 4 channels, as the latents, got 16"),
        ({"mean": Path}, "must be a file of weights, .*which cannot be read"),  # a class: nothing of it is executed
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=f"--vae-stats {sentence}"):
            LatentFormat.of(str(folder), str(path))
    cut_short(path)
    with pytest.raises(UserError, match="--vae-stats must be a file of weights"):
        LatentFormat.of(str(folder), str(path))


# ---- VAEs that are none ----


def test_a_vae_that_does_not_exist_or_is_none(folder, tmp_path):
    for name in ("", "/does/not/exist", "./x", "sd"):
        with pytest.raises(UserError, match=f"--vae must be mse, ema, .*got '{name}', which does not exist"):
            LatentFormat.of(name)
    with pytest.raises(UserError, match="--vae must be a folder of .* which has no config.json"):
        LatentFormat.of(str(tmp_path))
    other = changed_config(folder, tmp_path / "other", _class_name="AutoencoderKLQwenImage")
    with pytest.raises(UserError, match="must be one of AutoencoderKL, .*, got the class 'AutoencoderKLQwenImage'"):
        LatentFormat.of(str(other))
    for content, sentence in (("{", "is no JSON"), ("[]", "a JSON object, got list")):
        (other / "config.json").write_text(content)
        with pytest.raises(UserError, match=f"config.json must be the config of a VAE, .*{sentence}"):
            LatentFormat.of(str(other))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_channels": "4"}, "latent_channels of the config of the VAE .* must be an integer, got '4'"),
        ({"latent_channels": 0}, "latent_channels must be 1 to 65,536 of the VAE .*, got 0"),
        ({"block_out_channels": []}, "block_out_channels must be 1 to 16 numbers"),
        ({"block_out_channels": 4}, "block_out_channels of the config"),
        ({"block_out_channels": [10**9] * 3}, "block_out_channels must be 1 to 65,536"),
        ({"layers_per_block": 10**9}, "layers_per_block must be 1 to 16 .*, got 1000000000"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, "latents_mean must be 4 finite numbers"),
        ({"latents_mean": [0] * 4, "latents_std": [0] * 4}, "latents_std must not be 0"),
        ({"scaling_factor": "big"}, "scaling_factor of the config of the VAE .* must be a number or nothing"),
        ({"quantization_config": {"quant_method": "gguf"}}, "must have weights in float32"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(folder, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        LatentFormat.of(str(changed_config(folder, tmp_path / "x", **changes)))


def test_a_config_that_asks_for_more_than_its_weights_is_refused_before_memory_is_taken(folder, tmp_path):
    path = changed_config(folder, tmp_path / "x", block_out_channels=[60_000] * 3)
    with pytest.raises(UserError, match=r"its config.json asks for [\d,]+ numbers, but its weights .* have"):
        VAE(LatentFormat.of(str(path)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(
    st.sampled_from(["_class_name", "latent_channels", "block_out_channels", "layers_per_block", "scaling_factor",
                     "shift_factor", "latents_mean", "latents_std"]),
    st.recursive(st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
                 lambda inner: st.lists(inner, max_size=4), max_leaves=5),
))  # fmt: skip
def test_any_values_in_a_config_are_a_format_or_a_refusal(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **values}))
    with contextlib.suppress(UserError):
        latents = LatentFormat.of(str(tmp_path))
        assert len(latents.shift) == len(latents.scale) == latents.channels


def test_a_hub_name_without_a_hub_is_told_at_once_by_its_flag(monkeypatch):
    monkeypatch.setattr(io, "is_reachable", lambda: False)
    with pytest.raises(UserError, match="--vae must be .* the hub cannot be reached .* got somebody/none"):
        LatentFormat.of("somebody/none")


@pytest.mark.parametrize("changes", [{"scale": [0.0] * 4}, {"factor": 0}, {"shift": "0000"}, {"channels": 5}])
def test_a_format_from_a_file_that_is_none_is_refused(changes):
    for values in ({**asdict(SD_LATENTS), **changes}, None, [], {"channels": 4}):
        with pytest.raises(UserError, match="the record"):
            LatentFormat.from_dict(values, "the record")
