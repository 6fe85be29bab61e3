"""Autoencoders of diffusers that were saved to disk: encoding and decoding are those of their classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE
from haste.errors import UserError
from haste.vae import VAE, LatentFormat, with_deviation
from haste.vae.kinds import DC, RAE
from image_files import save_dc, save_rae


def changed_config(folder: Path, **changes) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def images_of(size: int, count: int = 18) -> torch.Tensor:
    """More than go through a VAE at a time."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- REPA-E's: AutoencoderKL with statistics ----


@pytest.mark.parametrize(("factor", "scale"), [(0.18215, 1.0), (1.0, 1.0), (None, 1.0), (0.5, 0.5)])
def test_statistics_of_a_config_give_unit_variance_unless_it_has_a_scale_of_its_own(tmp_path, factor, scale):
    """As REPA-E's folders: 16 pixels a latent. The class's default beside statistics is no scale."""
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]
    AutoencoderKL(
        block_out_channels=(4,) * 5, down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4, norm_num_groups=2, layers_per_block=1,
        latent_channels=4, latents_mean=mean, latents_std=std,
    ).save_pretrained(tmp_path)  # fmt: skip
    latents = LatentFormat.of(changed_config(tmp_path, scaling_factor=factor))
    assert (latents.factor, latents.shift) == (16, tuple(mean))
    assert latents.scale == tuple(scale / deviation for deviation in std)
    vae, original = VAE(latents), AutoencoderKL.from_pretrained(tmp_path).eval()
    z = torch.randn(2, 4, 1, 1)
    x = (z - torch.tensor(mean).view(4, 1, 1)) / torch.tensor(std).view(4, 1, 1) * scale
    torch.testing.assert_close(vae.decode(x), original.decode(z).sample.detach().clamp(-1, 1))


# ---- DC-AE ----


@pytest.mark.parametrize(("levels", "pixels"), [(3, 4), (6, 32)])
def test_a_deep_compression_autoencoder_has_no_deviation(tmp_path, levels, pixels):
    latents = LatentFormat.of(str(save_dc(tmp_path, levels)))
    assert latents == LatentFormat(str(tmp_path), 4, pixels, (0.0,) * 4, (0.5,) * 4)
    vae, original = VAE(latents), AutoencoderDC.from_pretrained(tmp_path).eval()
    images = images_of(pixels, 18 if levels == 3 else 2)
    with torch.no_grad():
        z = torch.cat([original.encode(part).latent for part in images.split(16)])
        back = torch.cat([original.decode(part).sample for part in z.split(16)])
    assert z.std() > 0 and z.shape[1:] == (4, 1, 1)
    moments = vae.encode(images)
    torch.testing.assert_close(moments[:, :4], z)
    assert moments.shape[1] == 8 and not moments[:, 4:].any()
    x = latents.sample_posterior(moments)
    torch.testing.assert_close(x, z * 0.5)
    torch.testing.assert_close(vae.decode(x), back.clamp(-1, 1))
    assert with_deviation(vae.encode_to_logvar(images))[:, 4:].max() < 1e-6  # of captions' data


def test_a_config_of_dc_that_cannot_be_meant_is_refused(tmp_path):
    folder = save_dc(tmp_path)
    for changes, sentence in [
        ({"latent_channels": 0}, "latent_channels must be 1 to 65,536"),
        ({"encoder_block_out_channels": []}, "encoder_block_out_channels must be 1 to 16 numbers"),
        ({"encoder_block_out_channels": [8, 8]}, "encoder_layers_per_block must be 2 of 0 to 16"),
        ({"decoder_block_out_channels": [8] * 4, "decoder_layers_per_block": [1] * 4}, "must be 3 numbers, as the enc"),
        ({"encoder_layers_per_block": [1, 1, 10**9]}, "encoder_layers_per_block must be 3 of 0 to 16"),
        ({"scaling_factor": "big"}, "scaling_factor of the config of the VAE .* must be a number"),
    ]:
        before = (folder / "config.json").read_text()
        with pytest.raises(UserError, match=sentence):
            LatentFormat.of(changed_config(folder, **changes))
        (folder / "config.json").write_text(before)
    wide = changed_config(folder, encoder_block_out_channels=[60_000] * 3)
    with pytest.raises(UserError, match=r"its config.json asks for [\d,]+ numbers, but its weights"):
        VAE(LatentFormat.of(wide))
    changed_config(folder, encoder_block_out_channels=[8, 8, 9])
    with pytest.raises(UserError, match="cannot be loaded"):  # the class asserts what goes together
        VAE(LatentFormat.of(str(folder)))


def test_defaults_are_those_of_diffusers():
    for kind, loader in ((DC, AutoencoderDC), (RAE, AutoencoderRAE)):
        import inspect

        defaults = {name: each.default for name, each in inspect.signature(loader.__init__).parameters.items()}
        for name, value in vars(kind()).items():
            wanted = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
            assert value == wanted or (name == "scaling_factor" and value is None and wanted == 1.0), name


# ---- RAE ----


@pytest.mark.parametrize("encoder_type", ["dinov2", "mae"])
def test_latents_of_an_rae_are_its_encoders_tokens_without_noise(tmp_path, encoder_type):
    folder = save_rae(tmp_path, encoder_type)
    latents = LatentFormat.of(str(folder), resolution=8)
    assert latents == LatentFormat(str(folder), 64, 4, (0.0,) * 64, (1.0,) * 64)
    vae, original = VAE(latents).train(), AutoencoderRAE.from_pretrained(folder).eval()
    images = images_of(8)
    with torch.no_grad():
        z = torch.cat([original.encode((part + 1) / 2).latent for part in images.split(16)])
        back = torch.cat([original.decode(part).sample for part in z.split(16)])
    torch.testing.assert_close(vae.encode(images), torch.cat([z, torch.zeros_like(z)], dim=1))
    assert z.shape[1:] == (64, 2, 2)
    assert back.shape == images.shape and 0 < back.min() < back.max() < 1
    torch.testing.assert_close(vae.decode(z), (back * 2 - 1).clamp(-1, 1))


def test_the_tokens_are_those_of_the_definition(tmp_path):
    """DINOv2's last hidden state without its class and register tokens, normalised at each position (section 3.1)."""
    vae = VAE(LatentFormat.of(str(save_rae(tmp_path))))
    encoder, config = vae._model.encoder, vae._model.config
    images = images_of(8, 2)
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate((images + 1) / 2, (28, 28), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        tokens = encoder((pixels - mean) / std).last_hidden_state[:, 5:]
        tokens = tokens.mT.reshape(2, 64, 2, 2).double()
    expected = (tokens - torch.tensor(config.latents_mean)) / (torch.tensor(config.latents_std) + 1e-5)
    torch.testing.assert_close(vae.encode(images)[:, :64].double(), expected, rtol=1e-5, atol=1e-5)


def test_an_rae_has_one_resolution(tmp_path):
    folder = str(save_rae(tmp_path))
    with pytest.raises(UserError, match="--resolution must be 8, the only one of the VAE .*, got 16"):
        LatentFormat.of(folder, resolution=16)
    vae = VAE(LatentFormat.of(folder))
    for call in (lambda: vae.encode(images_of(16, 1)), lambda: vae.decode(torch.zeros(1, 64, 4, 4))):
        with pytest.raises(UserError, match="--resolution must be 8, .* got 16"):
            call()


def test_an_rae_that_cannot_be_meant_is_refused(tmp_path):
    folder = save_rae(tmp_path)
    before = (folder / "config.json").read_text()
    for changes, sentence in [
        ({"encoder_hidden_size": 10**9}, "encoder_hidden_size must be 1 to 65,536"),
        ({"decoder_num_hidden_layers": 10**6}, "decoder_num_hidden_layers must be 1 to 128"),
        ({"encoder_input_size": 14 * 65}, "encoder_input_size must be 1 to 64 times encoder_patch_size, 14"),
        ({"reshape_to_2d": False}, "reshape_to_2d must be true"),
        ({"num_channels": 1}, "num_channels must be 3"),
    ]:
        with pytest.raises(UserError, match=sentence):
            LatentFormat.of(changed_config(folder, **changes))
        (folder / "config.json").write_text(before)
    for changes in ({"encoder_type": "clip"}, {"image_size": 12}, {"decoder_hidden_size": 4096}):
        changed_config(folder, **changes)
        with pytest.raises(UserError, match="the VAE .* cannot be loaded: "):
            VAE(LatentFormat.of(str(folder)))
        (folder / "config.json").write_text(before)
