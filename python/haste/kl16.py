"""MAR's KL-16, an autoencoder of LDM in one file of weights (kl16.ckpt), as diffusers' AutoencoderKL.

It has 16 latent channels and 16 pixels per latent along a side. LDM's modules are those of diffusers under other names,
so the weights are mapped by name and must fit exactly; the discriminator's, `loss.*`, are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
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

CHANNELS, LEVELS = 16, 5
FACTOR = 2 ** (LEVELS - 1)  # pixels per latent, along a side
SCALE = 0.2325  # of MAR and xAR
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
KEYS = ("model", "state_dict", "ema")  # that hold the weights, if they are not at the top; "ema" is safetensors' here

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# From LDM's names to diffusers', one after the other.
NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.(down|up)\.(\d)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d)\.attn\.", r".\1_blocks.\2.attentions."),
    # LDM counts the decoder's levels from full resolution, diffusers from the latents.
    (r"\.up_blocks\.(\d)\.", lambda found: f".up_blocks.{LEVELS - 1 - int(found[1])}."),
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


def load_kl16(path: str | Path) -> AutoencoderKL:
    """Load KL-16 from MAR's file.

    Args:
        path: kl16.ckpt, whose weights are under "model", or the same weights bare or as safetensors. Nothing that the
            file pickles is executed.

    Returns:
        The model in float32, in eval mode. Its save_pretrained() writes a folder that `--vae` and diffusers take.

    Raises:
        UserError: the file cannot be read, or holds other weights than KL-16's.
    """
    from diffusers import AutoencoderKL  # imported here, as it takes a second

    weights = _read_weights(Path(path).expanduser())
    config = _config(weights, path)
    try:
        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
    except ValueError as error:  # widths that 32 groups do not divide
        raise UserError(f"{_wanted(path)} cannot be built: {in_one_line(error)}") from error
    renamed = {rename(name): _as_linear(rename(name), weight) for name, weight in weights.items()}
    _check_fit({name: tuple(weight.shape) for name, weight in model.state_dict().items()}, renamed, path)
    model.load_state_dict({name: weight.float() for name, weight in renamed.items()}, assign=True)
    return model.eval()


def rename(name: str) -> str:
    """diffusers' name of one of LDM's weights."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


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
    """AutoencoderKL's config. The widths of the levels are those of the weights, which are 128, 128, 256, 256, 512."""

    def outputs(name: str) -> int | None:
        return weights[name].shape[0] if name in weights and weights[name].dim() else None

    if not weights:
        raise UserError(f"{_wanted(path)} holds none of its weights, such as encoder.conv_in.weight")
    channels = outputs("post_quant_conv.weight")
    if channels != CHANNELS:
        raise UserError(f"{_wanted(path)} has {'no' if channels is None else channels} latent channels")
    found = [outputs(f"encoder.down.{level}.block.0.conv1.weight") for level in range(LEVELS + 1)]
    widths = [width for width in found if width is not None]
    if len(widths) != LEVELS or found[-1] is not None:
        raise UserError(f"{_wanted(path)} has {len(widths)} levels, which KL-16 has {LEVELS} of")
    return {
        "latent_channels": CHANNELS,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * (LEVELS - 1) + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
        "norm_num_groups": 32,
        "scaling_factor": SCALE,
        "sample_size": 256,
    }


def _check_fit(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError for a missing weight, one too many, or one of another shape."""
    missing, excess = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or excess:
        others = f"lacks {missing[0]}" if missing else f"has {excess[0]}, which KL-16 has not"
        raise UserError(f"{_wanted(path)} {others} (in diffusers' names)")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            got = " x ".join(map(str, weights[name].shape))
            raise UserError(f"{_wanted(path)} has {got} numbers for {name}, where {math.prod(shape):,} fit")


def _wanted(path: str | Path) -> str:
    return f"--vae must be a file of MAR's KL-16, with {CHANNELS} latent channels, a folder or a hub name; {path}"
