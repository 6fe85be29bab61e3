"""Autoencoders of LDM in one file of weights, such as MAR's KL-16 (kl16.ckpt) and VA-VAE, as diffusers' AutoencoderKL.

LDM's modules are those of diffusers under other names, so the weights are mapped by name and must fit exactly; their
shapes tell the levels and channels. What else a file holds, such as a discriminator or VA-VAE's DINOv2, is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.io import in_bytes
from haste.validation import shown
from haste.weights import read_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KL16_CHANNELS, KL16_SCALE = 16, 0.2325  # of MAR and xAR
MOST_LEVELS = 10  # one digit of the names
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
KEYS = ("model", "state_dict", "ema")  # that hold the weights, if they are not at the top; "ema" is safetensors' here

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# From LDM's names to diffusers', one after the other.
NAMES = [
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.(down|up)\.(\d)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def is_file_of_weights(source: str) -> bool:
    """Whether --vae is a file rather than a folder or a hub name."""
    path = Path(source)
    return path.is_file() or (source.endswith(SUFFIXES) and not path.is_dir())


def load_ldm(path: str | Path) -> AutoencoderKL:
    """Load an autoencoder of LDM from its file.

    Args:
        path: such as kl16.ckpt, whose weights are under "model", or VA-VAE's, under "state_dict"; or the same weights
            bare or as safetensors. Nothing that the file pickles is executed.

    Returns:
        The model in float32, in eval mode, with the scale of KL-16 or Stable Diffusion in its config, or 1 for others.
        Its save_pretrained() writes a folder that `--vae` and diffusers take.

    Raises:
        UserError: the file cannot be read, or holds other weights than those of such an autoencoder.
    """
    from diffusers import AutoencoderKL  # imported here, as it takes a second

    weights = _read_weights(Path(path).expanduser())
    config = _config(weights, path)
    try:
        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
    except ValueError as error:  # widths that 32 groups do not divide
        raise UserError(f"{_wanted(path)} cannot be built: {in_one_line(error)}") from error
    levels = len(config["block_out_channels"])
    renamed = {rename(name, levels): weight for name, weight in weights.items()}
    renamed = {name: _as_linear(name, weight) for name, weight in renamed.items()}
    _check_fit({name: tuple(weight.shape) for name, weight in model.state_dict().items()}, renamed, path)
    model.load_state_dict({name: weight.float() for name, weight in renamed.items()}, assign=True)
    return model.eval()


def rename(name: str, levels: int) -> str:
    """diffusers' name of one of LDM's weights, in an autoencoder of so many levels."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    # LDM counts the decoder's levels from full resolution, diffusers from the latents.
    return re.sub(r"\.up_blocks\.(\d)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", name)


def _as_linear(name: str, weight: Tensor) -> Tensor:
    """The 1 x 1 kernels of attention are matrices in diffusers."""
    squeezed = ".attentions." in name and weight.dim() == 4 and weight.shape[2:] == (1, 1)
    return weight[:, :, 0, 0] if squeezed else weight


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        content: Mapping[str, Any] = read_file(path)
    except UserError as error:
        raise UserError(f"--vae must be a file of weights: {error}") from error
    found = next((content[key] for key in KEYS if isinstance(content.get(key), Mapping)), content)
    weights = {name: value for name, value in found.items() if isinstance(name, str) and name.startswith(PARTS)}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UserError(f"{_wanted(path)} has {shown(weight)} for {name}")
    numbers, size = sum(weight.numel() for weight in weights.values()), path.stat().st_size
    if numbers > size:  # views that claim more than they hold
        raise UserError(f"{_wanted(path)} has {in_bytes(size)} for {numbers:,} numbers")
    return weights


def _config(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """AutoencoderKL's config, from the names and shapes of the weights."""
    if not weights:
        raise UserError(f"{_wanted(path)} holds none of its weights, such as encoder.conv_in.weight")

    def size(name: str, dim: int = 0) -> int | None:
        return weights[name].shape[dim] if name in weights and weights[name].dim() > dim else None

    def sizes(names: str) -> list[int]:
        """Of the weights whose name has a number in place of the braces, from 0 on."""
        found = [size(names.format(number)) for number in range(MOST_LEVELS)]
        return [width for width in found[: (*found, None).index(None)] if width is not None]

    channels = size("decoder.conv_in.weight", dim=1)
    widths = sizes("encoder.down.{}.block.0.conv1.weight")
    layers = len(sizes("encoder.down.0.block.{}.conv1.weight"))
    for found, name in ((channels, "decoder.conv_in.weight"), (layers, "encoder.down.0.block.0.conv1.weight")):
        if not found:
            raise UserError(f"{_wanted(path)} lacks {name}")
    down = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(len(widths))]
    up = [f"decoder.up.{level}.attn.0.q.weight" in weights for level in reversed(range(len(widths)))]
    return {
        "latent_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in up],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "norm_num_groups": 32,
        "scaling_factor": _scale(channels, len(widths), any(up)),
        "sample_size": 256,
    }


def _scale(channels: int | None, levels: int, attends: bool) -> float:
    """Of the published autoencoder with these latents; VA-VAE's and others' have statistics instead."""
    if (channels, levels) == (4, 4):  # Stable Diffusion's
        return 0.18215
    return KL16_SCALE if (channels, levels, attends) == (KL16_CHANNELS, 5, False) else 1.0


def _check_fit(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError for a missing weight, one too many, or one of another shape."""
    missing, excess = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or excess:
        others = f"lacks {missing[0]}" if missing else f"has {excess[0]}, which LDM's autoencoders have not"
        raise UserError(f"{_wanted(path)} {others} (in diffusers' names)")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            got = " x ".join(map(str, weights[name].shape))
            raise UserError(f"{_wanted(path)} has {got} numbers for {name}, where {math.prod(shape):,} fit")


def _wanted(path: str | Path) -> str:
    return f"--vae must be a file of LDM's autoencoder, such as MAR's KL-16 or VA-VAE, a folder or a hub name; {path}"
