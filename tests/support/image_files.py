"""Images and a VAE on disk, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(count: int, size: tuple[int, int] = (20, 16)) -> list[Image.Image]:
    """Different parts of scikit-learn's two photographs, `size` (width, height) each."""
    width, height = size
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    corners = [(11 * index % 600, 7 * index % 400) for index in range(count)]
    return [
        sources[index % 2].crop((left, top, left + width, top + height)) for index, (left, top) in enumerate(corners)
    ]


def write_classes(folder: Path, count: int = 12, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """folder/<class>/NN.png, `count` photographs of 20 x 16 pixels dealt out to the classes."""
    for index, image in enumerate(photographs(count)):
        path = folder / classes[index % len(classes)] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def save_vae(folder: Path, channels: int = 4) -> Path:
    """A random AutoencoderKL that makes one latent of 4 x 4 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pixels_of(image: Image.Image) -> np.ndarray:
    """(3, H, W) uint8."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


KL16_NAMES = Path(__file__).with_name("kl16_names.json")


def kl16_weights(width: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of MAR's KL-16, whose narrowest level has `width` channels instead of 128."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, sizes in json.loads(KL16_NAMES.read_text()).items():
        shape = [size * width // 128 if size >= 128 else size for size in sizes]
        weight = torch.randn(shape, generator=generator)
        scaled = weight / weight[0].numel() ** 0.5 if weight.dim() > 1 else 0.1 * weight
        weights[name] = scaled + 1 if "norm" in name and name.endswith("weight") else scaled
    return weights


def write_mar_cache(folder: Path, images: Path, shape: tuple[int, int, int] = (32, 2, 2)) -> Path:
    """MAR's cached latents of the images in class folders: random moments, another set for the mirror images."""
    generator = np.random.default_rng(0)
    for path in sorted(images.rglob("*.png")):
        target = folder / path.relative_to(images).with_name(f"{path.name}.npz")
        target.parent.mkdir(parents=True, exist_ok=True)
        moments, flipped = generator.normal(size=(2, *shape)).astype(np.float32)
        np.savez(target, moments=moments, moments_flip=flipped)
    return folder
