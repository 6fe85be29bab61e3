"""MAR's KL-16 and VA-VAE from their files, against LDM's autoencoder written out below under the public names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from haste.errors import UserError
from haste.vae import KL16_LATENTS, VAE, LatentFormat, load_ldm
from haste.vae.ldm import rename
from image_files import KL16_NAMES, cut_short, kl16_weights
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return kl16_weights()


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kl16") / "kl16.ckpt"
    torch.save({"model": {**weights, "loss.logvar": torch.zeros(())}, "epoch": 3}, path)
    return path


# ---- LDM's autoencoder ----


def conv(w: Weights, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def residual(w: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", F.silu(norm(w, f"{name}.norm1", x)))
    h = conv(w, f"{name}.conv2", F.silu(norm(w, f"{name}.norm2", h)))
    narrow = f"{name}.nin_shortcut.weight" in w
    return h + (conv(w, f"{name}.nin_shortcut", x, padding=0) if narrow else x)


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    h = norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", h, padding=0).flatten(2) for part in "qkv")  # (B, C, N)
    scores = torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1] ** 0.5
    mixed = torch.einsum("bnm,bcm->bcn", scores.softmax(-1), v).view_as(x)
    return x + conv(w, f"{name}.proj_out", mixed, padding=0)


def middle(w: Weights, name: str, x: Tensor) -> Tensor:
    return residual(w, f"{name}.block_2", attention(w, f"{name}.attn_1", residual(w, f"{name}.block_1", x)))


def attends(w: Weights, level: str) -> bool:
    return f"{level}.attn.0.q.weight" in w


def levels_of(w: Weights) -> int:
    return len({name.split(".")[2] for name in w if name.startswith("encoder.down.")})


def encode(w: Weights, images: Tensor) -> Tensor:
    """Mean and logarithm of the variance."""
    h, levels = conv(w, "encoder.conv_in", images), levels_of(w)
    for level in range(levels):
        for block in range(2):
            h = residual(w, f"encoder.down.{level}.block.{block}", h)
            h = attention(w, f"encoder.down.{level}.attn.{block}", h) if attends(w, f"encoder.down.{level}") else h
        if level < levels - 1:  # padded right and at the bottom
            h = conv(w, f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
    h = middle(w, "encoder.mid", h)
    h = conv(w, "encoder.conv_out", F.silu(norm(w, "encoder.norm_out", h)))
    return conv(w, "quant_conv", h, padding=0) if "quant_conv.weight" in w else h


def decode(w: Weights, latents: Tensor) -> Tensor:
    z = conv(w, "post_quant_conv", latents, padding=0) if "post_quant_conv.weight" in w else latents
    h = conv(w, "decoder.conv_in", z)
    h = middle(w, "decoder.mid", h)
    for level in reversed(range(levels_of(w))):
        for block in range(3):
            h = residual(w, f"decoder.up.{level}.block.{block}", h)
            h = attention(w, f"decoder.up.{level}.attn.{block}", h) if attends(w, f"decoder.up.{level}") else h
        if level > 0:
            h = conv(w, f"decoder.up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(w, "decoder.conv_out", F.silu(norm(w, "decoder.norm_out", h)))


def test_it_encodes_and_decodes_as_ldm_does(weights, file):
    vae = VAE(LatentFormat.of(str(file)))
    images = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, logvar = encode(weights, images).chunk(2, dim=1)
    torch.testing.assert_close(vae.encode(images), torch.cat([mean, (0.5 * logvar).exp()], 1), rtol=0, atol=1e-5)
    latents = torch.randn(3, 16, 2, 3, generator=torch.Generator().manual_seed(2))
    expected = decode(weights, latents)
    assert 0.05 < expected.std() < 20  # before the clamp to [-1, 1]
    torch.testing.assert_close(vae.decode(latents * 0.2325), expected.clamp(-1, 1), rtol=0, atol=1e-5)


# ---- others than KL-16 ----


def ldm_weights(
    widths: tuple[int, ...], blocks: int, channels: int, down: set[int], up: set[int], quant: bool = True
) -> Weights:
    """Random weights of LDM's autoencoder, with attention at the levels `down` of the encoder, `up` of the decoder."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0],)

    def add_residual(name: str, inside: int, out: int) -> None:
        add(f"{name}.norm1", inside), add(f"{name}.conv1", out, inside, 3, 3)
        add(f"{name}.norm2", out), add(f"{name}.conv2", out, out, 3, 3)
        if inside != out:
            add(f"{name}.nin_shortcut", out, inside, 1, 1)

    def add_attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    def add_middle(name: str, width: int) -> None:
        add_residual(f"{name}.block_1", width, width), add_residual(f"{name}.block_2", width, width)
        add_attention(f"{name}.attn_1", width)

    first, last, levels = widths[0], widths[-1], len(widths)
    add("encoder.conv_in", first, 3, 3, 3), add("encoder.norm_out", last), add("decoder.norm_out", first)
    add("encoder.conv_out", 2 * channels, last, 3, 3), add("decoder.conv_in", last, channels, 3, 3)
    add("decoder.conv_out", 3, first, 3, 3), add_middle("encoder.mid", last), add_middle("decoder.mid", last)
    if quant:
        add("quant_conv", 2 * channels, 2 * channels, 1, 1), add("post_quant_conv", channels, channels, 1, 1)
    for level, width in enumerate(widths):
        below, above = widths[max(level - 1, 0)], widths[min(level + 1, levels - 1)]
        for block in range(blocks):
            add_residual(f"encoder.down.{level}.block.{block}", width if block else below, width)
        for block in range(blocks + 1):
            add_residual(f"decoder.up.{level}.block.{block}", width if block else above, width)
        for block in range(blocks) if level in down else ():
            add_attention(f"encoder.down.{level}.attn.{block}", width)
        for block in range(blocks + 1) if level in up else ():
            add_attention(f"decoder.up.{level}.attn.{block}", width)
        if level < levels - 1:
            add(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        if level > 0:
            add(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        scaled = weight / weight[0].numel() ** 0.5 if weight.dim() > 1 else 0.1 * weight
        weights[name] = scaled + 1 if "norm" in name and name.endswith("weight") else scaled
    return weights


def test_the_names_are_those_of_the_public_file():
    weights = ldm_weights((32, 32, 64, 64, 128), 2, 16, down={4}, up=set())
    found = {name: list(weight.shape) for name, weight in weights.items()}
    assert found == {name: list(weight.shape) for name, weight in kl16_weights().items()}


def assert_as_exact(vae: VAE, weights: Weights, scale: float, images: Tensor, latents: Tensor) -> None:
    """Encoding and decoding are as far from float64 as twice float32's, and a rounding."""
    exact = {name: weight.double() for name, weight in weights.items()}

    def moments(w: Weights, x: Tensor) -> Tensor:
        mean, logvar = encode(w, x).chunk(2, dim=1)
        return torch.cat([mean, (0.5 * logvar).exp()], 1)

    for found, definition, given in (
        (vae.encode(images), moments, images),
        (vae.decode(latents * scale), lambda w, z: decode(w, z).clamp(-1, 1), latents),
    ):
        expected, eager = definition(exact, given.double()), definition(weights, given)
        allowed = 2 * (eager - expected).abs().max() + 1e-6 * expected.abs().max()
        assert (found - expected).abs().max() <= allowed


def test_vavae_encodes_and_decodes_as_ldm_does(tmp_path):
    """32 latent channels of 16 pixels, and attention in the decoder as well."""
    weights = ldm_weights((32, 32, 32, 32, 64), 2, 32, down={4}, up={4})
    others = {"foundation_model.model.cls_token": torch.zeros(1, 1, 8), "linear_proj.weight": torch.zeros(8, 32, 1, 1)}
    path = tmp_path / "vavae-imagenet256-f16d32-dinov2.pt"
    torch.save({"state_dict": {**weights, **others, "loss.logvar": torch.zeros(())}, "epoch": 49}, path)
    latents = LatentFormat.of(str(path))
    assert latents == LatentFormat(str(path), 32, 16, (0.0,) * 32, (1.0,) * 32)
    generator = torch.Generator().manual_seed(1)
    images, z = torch.rand(1, 3, 32, 16, generator=generator) * 2 - 1, torch.randn(1, 32, 2, 1, generator=generator)
    assert_as_exact(VAE(latents), weights, 1.0, images, z)
    torch.save({"mean": torch.ones(1, 32, 1, 1), "std": torch.full((1, 32, 1, 1), 4.0)}, tmp_path / "latents_stats.pt")
    scaled = LatentFormat.of(str(path), str(tmp_path / "latents_stats.pt"))  # LightningDiT's
    assert (scaled.shift, scaled.scale) == ((1.0,) * 32, (0.25,) * 32)


@pytest.mark.parametrize("quant", [True, False])
def test_the_levels_and_blocks_are_those_of_the_file(tmp_path, quant):
    """As REPA-E's f8d4, whose latents are Stable Diffusion's; or without the 1 x 1 kernels."""
    weights = ldm_weights((32, 64, 32, 32), 2, 4, down=set(), up=set(), quant=quant)
    torch.save(weights, tmp_path / "sdvae-f8d4.pt")
    latents = LatentFormat.of(str(tmp_path / "sdvae-f8d4.pt"))
    assert (latents.channels, latents.factor, latents.scale) == (4, 8, (0.18215,) * 4)
    generator = torch.Generator().manual_seed(1)
    images, z = torch.rand(1, 3, 16, 8, generator=generator) * 2 - 1, torch.randn(1, 4, 2, 1, generator=generator)
    assert_as_exact(VAE(latents), weights, 0.18215, images, z)


# ---- the file ----


def test_the_format_is_16_channels_of_16_pixels_scaled_by_0_2325(file):
    latents = LatentFormat.of(str(file))
    assert latents == LatentFormat(str(file), 16, 16, (0.0,) * 16, (0.2325,) * 16)
    assert latents.input_size(256) == 16


def test_all_public_names_are_one_to_one_those_of_diffusers():
    with torch.device("meta"):
        model = AutoencoderKL(
            latent_channels=16, block_out_channels=(128, 128, 256, 256, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",) * 5, norm_num_groups=32,
        )  # fmt: skip
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    public = json.loads(KL16_NAMES.read_text())
    renamed = {rename(name, 5): shape for name, shape in public.items()}
    assert len(public) == len(renamed) == len(shapes) == 312
    for name, shape in renamed.items():
        assert shapes[name] == shape[: len(shapes[name])], name
    assert sum(weight.numel() for weight in model.state_dict().values()) == 66_456_019


def test_bare_weights_safetensors_and_halves_are_read_alike(weights, file, tmp_path):
    expected = load_ldm(file).state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "x.safetensors")
    torch.save({"model": {name: weight.half() for name, weight in weights.items()}}, tmp_path / "half.ckpt")
    for name, tolerance in (("bare.pt", 0), ("x.safetensors", 0), ("half.ckpt", 2e-3)):
        found = load_ldm(tmp_path / name).state_dict()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_it_can_be_converted_to_a_folder(file, tmp_path):
    load_ldm(file).save_pretrained(tmp_path / "kl16")
    converted = LatentFormat.of(str(tmp_path / "kl16"))
    assert (converted.shift, converted.scale) == ((0.0,) * 16, (0.2325,) * 16)
    torch.testing.assert_close(VAE(converted).state_dict(), VAE(LatentFormat.of(str(file))).state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}, "has 4 x 4 x 1 x 1 numbers for post_quant_conv.weight"),
        ({"decoder.conv_in.weight": None}, "lacks decoder.conv_in.weight"),
        ({"encoder.down.0.block.0.conv1.weight": None}, "lacks encoder.down.0.block.0.conv1.weight"),
        ({"encoder.down.4.block.0.conv1.weight": None}, "has .* for .*, where .* fit|has .*, which LDM's"),
        ({"decoder.mid.attn_1.q.weight": None}, "lacks decoder.mid_block.attentions.0.to_q.weight"),
        ({"decoder.up.3.attn.0.k.weight": torch.zeros(1)}, "has decoder.up_blocks.1.attentions.0.to_k.weight"),
        ({"quant_conv.bias": torch.zeros(31)}, "has 31 numbers for quant_conv.bias, where 32 fit"),
        ({"quant_conv.bias": "zeros"}, "has 'zeros' for quant_conv.bias"),
        ({"encoder.down.0.block.0.conv1.weight": torch.zeros(33, 3, 3, 3)}, "cannot be built"),
        ({"encoder.conv_in.weight": torch.zeros(1).expand(10**9)}, "has .* for 1,0.* numbers"),
    ],
)
def test_other_weights_are_refused(weights, tmp_path, change, sentence):
    changed = {name: weight for name, weight in {**weights, **change}.items() if weight is not None}
    torch.save(changed, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=f"--vae must be a file of LDM's autoencoder, .*x.ckpt {sentence}"):
        LatentFormat.of(str(tmp_path / "x.ckpt"))


def test_files_that_hold_no_weights_are_refused(file, tmp_path):
    path = tmp_path / "x.ckpt"
    for content in ({"model": {"blocks.0.weight": torch.zeros(2)}}, {}, {"args": argparse.Namespace(a=1)}):
        torch.save(content, path)
        with pytest.raises(UserError, match="--vae must be a file of LDM's autoencoder, .* holds none of its weights"):
            LatentFormat.of(str(path))
    path.write_bytes(file.read_bytes())
    cut_short(path)
    with pytest.raises(UserError, match="--vae must be a file of weights: .*x.ckpt is not a valid checkpoint"):
        LatentFormat.of(str(path))
    torch.save({"model": print}, path)  # a function: it is not called
    with pytest.raises(UserError, match="--vae"):
        LatentFormat.of(str(path))
    for missing in (str(tmp_path / "none.ckpt"), "exps/none.ckpt"):
        with pytest.raises(UserError, match="--vae must be .* a file of LDM's, .*got '.*none.ckpt'"):
            LatentFormat.of(missing)


def test_latents_of_a_cache_without_a_vae_name_the_file_that_decodes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--vae must be .* a file of LDM's, .*got 'kl16.ckpt'"):
        VAE(KL16_LATENTS)
