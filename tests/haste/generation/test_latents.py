"""Students of latents: which VAE makes images of what they draw."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from digits_run import write_run
from haste.data.images import to_uint8
from haste.errors import UserError
from haste.generation.checkpoint import latent_format, load_checkpoint
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler, image_generator
from haste.samplers import initial_noise, sample
from haste.vae import PUBLISHED_VAES, SD_LATENTS, VAE, LatentFormat
from image_files import save_vae
from latent_student import IMAGE, write_bare, write_ours, write_repas


@pytest.fixture
def student(tmp_path):
    return load_checkpoint(write_ours(tmp_path / "0000000.pt", tmp_path / "vae"))


def test_latents_are_decoded_by_the_vae_of_the_checkpoint(student, tmp_path):
    images, labels = Sampler(student, SamplingConfig(num_steps=3, labels="3,1")).draw(range(3))
    generators = [image_generator(0, index, "noise") for index in range(3)]
    drawn = sample(student.model, initial_noise((3, 4, 4, 4), generators), torch.tensor([3, 1, 3]), num_steps=3)
    wanted = to_uint8(VAE(LatentFormat.of(str(tmp_path / "vae"))).decode(drawn))
    assert images.shape == (3, IMAGE, IMAGE, 3) and (images == wanted).all() and images.std() > 1
    assert labels.tolist() == [3, 1, 3]


def test_another_decoder_keeps_the_scale_that_the_model_was_trained_with(student, tmp_path):
    student.recorded["latents"]["scale"] = (1.0, 2.0, 3.0, 4.0)
    other = save_vae(tmp_path / "finetuned")
    latents = latent_format(student, str(other))
    assert latents == replace(LatentFormat.of(str(other)), scale=(1.0, 2.0, 3.0, 4.0))


def test_a_vae_that_does_not_fit_is_refused(student, tmp_path):
    with pytest.raises(UserError, match="--vae is mse, with 4 channels and 8 pixels per latent; it must have 4 and 4"):
        latent_format(student, "mse")
    wide = save_vae(tmp_path / "wide", channels=16)
    bare = load_checkpoint(write_bare(tmp_path / "bare.pt"))
    with pytest.raises(UserError, match="whose latents have 16 channels; it must have the 4 that the model draws"):
        latent_format(bare, str(wide))
    with pytest.raises(UserError, match="which does not exist; it must be mse or ema"):
        Sampler(student, SamplingConfig(vae="./none"))


def test_a_student_of_pixels_has_none(tmp_path):
    student = load_checkpoint(write_run(tmp_path))
    assert latent_format(student) is None
    with pytest.raises(UserError, match="--vae is ema, whose latents have 4 channels; it must have the 1"):
        latent_format(student, "ema")
    with pytest.raises(UserError, match="--vae is ema, and the model draws pixels, which need none"):
        latent_format(replace(student, recorded={"latents": None}), "ema")


def test_other_trainers_latents_are_those_of_the_published_vae(tmp_path):
    student = load_checkpoint(write_repas(tmp_path / "0400000.pt"))
    assert latent_format(student) == replace(SD_LATENTS, vae=PUBLISHED_VAES["ema"])
    assert latent_format(student, "mse") == SD_LATENTS


def test_one_vae_decodes_a_run_that_was_gone_on_with(tmp_path):
    """REPA's checkpoint names none; ours names that of Stable Diffusion which made the latents."""
    student = load_checkpoint(write_ours(tmp_path / "0000000.pt", tmp_path / "vae"))
    student.recorded["latents"] = asdict(SD_LATENTS)
    assert latent_format(student) == latent_format(load_checkpoint(write_repas(tmp_path / "0400000.pt")))
    assert latent_format(student, "mse") == SD_LATENTS
    student.config.vae = "mse"  # which the run was told
    assert latent_format(student) == SD_LATENTS
