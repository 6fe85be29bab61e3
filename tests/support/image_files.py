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


def save_dc(folder: Path, levels: int = 3, channels: int = 4, **changes) -> Path:
    """A random AutoencoderDC with the parts of the public ones for ImageNet, which halve the image twice at first: one
    latent of 2^(levels - 1) pixels along a side. Its first half convolves, its second attends."""
    from diffusers import AutoencoderDC

    half, rest = levels // 2, levels - levels // 2
    layers = (0,) + (1,) * (levels - 1)
    torch.manual_seed(0)
    model = AutoencoderDC(
        **{
            "latent_channels": channels, "attention_head_dim": 4, "scaling_factor": 0.5,
            "encoder_block_types": ("ResBlock",) * half + ("EfficientViTBlock",) * rest,
            "decoder_block_types": ("ResBlock",) * half + ("EfficientViTBlock",) * rest,
            "encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels,
            "encoder_layers_per_block": layers, "decoder_layers_per_block": layers,
            "encoder_qkv_multiscales": ((),) * levels, "decoder_qkv_multiscales": ((),) * levels,
            "decoder_norm_types": ("batch_norm",) * half + ("rms_norm",) * rest,
            "decoder_act_fns": ("relu",) * half + ("silu",) * rest, **changes,
        }
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def save_rae(folder: Path, encoder_type: str = "dinov2", grid: int = 2, **changes) -> Path:
    """A random AutoencoderRAE of images of 4 · grid pixels, with statistics at each position as in the public ones."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    patch = 14 if encoder_type == "dinov2" else 16
    model = AutoencoderRAE(
        **{
            "encoder_type": encoder_type, "encoder_hidden_size": 64, "encoder_patch_size": patch,
            "encoder_num_hidden_layers": 1, "encoder_input_size": grid * patch, "patch_size": 4,
            "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 64, "latents_mean": torch.randn(64, grid, grid),
            "latents_std": torch.rand(64, grid, grid) + 0.5, "noise_tau": 0.8, **changes,
        }
    )  # fmt: skip
    model.save_pretrained(folder)
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


def captions_of(index: int) -> list[str]:
    """One to three captions of photograph number `index`; some photographs have one in common."""
    colours, things = ("red", "green", "dark"), ("temple", "flower")
    return [f"a {colours[(index + n) % 3]} photograph of a {things[index % 2]}" for n in range(1 + index % 3)]


def write_pairs(folder: Path, count: int = 6, size: tuple[int, int] = (20, 16)) -> Path:
    """folder/NN.jpg or .png and NN.txt with one caption a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(photographs(count, size)):
        image.save(folder / f"{index:02d}.{'jpg' if index % 2 else 'png'}")
        (folder / f"{index:02d}.txt").write_text("\n".join(captions_of(index)) + "\n")
    return folder


def write_coco(root: Path, count: int = 6, split: str = "train2014", size: tuple[int, int] = (20, 16)) -> Path:
    """MS-COCO's layout, whose lists are in no order: images numbered 10·(index + 1). The path of the annotations."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index, image in enumerate(photographs(count, size)):
        name = f"COCO_{split}_{10 * (index + 1):012d}.jpg"
        image.save(root / split / name)
        images.append({"id": 10 * (index + 1), "file_name": name, "height": size[1], "width": size[0]})
        for n, caption in enumerate(captions_of(index)):
            annotations.append({"image_id": 10 * (index + 1), "id": 100 * n + index, "caption": f"{caption}\n"})
    path = root / "annotations" / f"captions_{split}.json"
    content = {"info": {}, "images": images[::-1], "annotations": sorted(annotations, key=lambda each: each["id"])}
    path.write_text(json.dumps(content))
    return path


def write_tars(folder: Path, count: int = 6, per_tar: int = 4, kind: str = "txt") -> Path:
    """webdataset's tars: 000000000.jpg, .txt (or .json with a caption) and .json of other things."""
    import io
    import tarfile

    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w") as tar:
            for index in range(start, min(start + per_tar, count)):
                file = io.BytesIO()
                photographs(index + 1)[index].save(file, format="JPEG")
                text = (
                    "\n".join(captions_of(index)) if kind == "txt" else json.dumps({"caption": captions_of(index)[0]})
                )
                members = {"jpg": file.getvalue(), kind: text.encode(), "seg.png": b"another image"}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"./{index:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_hub_captions(folder: Path, count: int = 6, column: str = "caption", lists: bool = True) -> Path:
    """A Hugging Face data set on disk with images, captions, and a label that is text."""
    import datasets

    text = datasets.Value("string")
    features = {"image": datasets.Image(), column: datasets.List(text) if lists else text, "label": text}
    values = {
        "image": photographs(count),
        column: [captions_of(index) if lists else captions_of(index)[0] for index in range(count)],
        "label": ["x"] * count,
    }
    datasets.Dataset.from_dict(values, datasets.Features(features)).save_to_disk(folder)
    return folder
