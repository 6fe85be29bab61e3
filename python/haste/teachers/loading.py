"""The files of a teacher: its config and normalisation, checked before a model is built, and its grid of positions.

`same_teacher` compares two names by their configs, without loading weights or asking the hub.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig

from haste._compat import cached_file_if_any
from haste.errors import UserError, in_one_line
from haste.io import loading_arguments, read_json, require_source
from haste.registry import TEACHERS, plugin
from haste.teachers.families import (
    HALF,
    PUBLISHED,
    VISION_TOWERS,
    Family,
    Normalisation,
    Shape,
    require_known,
    resolve_teacher,
)
from haste.validation import build
from haste.weights import require_weights

logger = logging.getLogger(__name__)

# ---- the config ----

LARGEST_SIDE = 4096  # pixels

# The least and the most of what a config may ask for. The largest encoders have 80 layers of 3,200.
SIZES = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 2**20),
    "num_channels": (1, 1024),
    "num_register_tokens": (0, 1024),
    "num_cls_tokens": (0, 1024),
    "num_registers": (0, 1024),
    "max_img_size": (1, 2**13),
    "num_patches": (1, 2**20),
}
OPTIONAL = (
    "intermediate_size",
    "num_register_tokens",
    "num_cls_tokens",
    "num_registers",
    "max_img_size",
    "num_patches",
)  # fmt: skip - not every family has them

# The most parameters per byte of a model's files, so that no memory is taken for weights that are not there. Half of a
# two-tower model may be left out, and a weight may have one byte.
MOST_NUMBERS_PER_BYTE = 4


def load_config(name: str, source: str, flag: str = "--enc-type") -> PretrainedConfig:
    """Load the config of the image side of a checkpoint. Runs no code that comes with it.

    Args:
        name: of the teacher, for messages.
        source: as `resolve_teacher` returns it.
        flag: that gave the name, for messages.

    Raises:
        UserError: no config, an unknown family, sizes out of bounds, or more parameters than the files can hold.
    """
    require_source(name, source, flag)
    values = read_checkpoint_json(name, source, "config.json", "the config of a teacher")
    if values is None:
        raise UserError(f"the teacher {name} cannot be loaded: it has no config.json")
    require_known(name, values.get("model_type"))
    if values.get("quantization_config") is not None:
        raise UserError(f"the teacher {name} must have weights in float32, float16 or bfloat16, got quantized ones")
    for part in (values, values.get("vision_config"), values.get("text_config")):
        _check_sizes(name, part if isinstance(part, dict) else {})  # transformers makes lists of these lengths
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **loading_arguments(source))
    except Exception as error:  # transformers raises anything for values of a wrong type
        raise UserError(f"the teacher {name} cannot be loaded: {in_one_line(error)}") from error
    tower = config.vision_config if config.model_type in VISION_TOWERS else config
    _check_sizes(name, {key: getattr(tower, key, None) for key in SIZES})
    own_image_size(name, tower)
    patch_size_of(name, tower)
    if Path(source).is_dir():
        require_weights(
            Path(source),
            f"the teacher {name}",
            lambda: AutoModel.from_config(config, trust_remote_code=False),
            MOST_NUMBERS_PER_BYTE,
        )
    return tower


def read_checkpoint_json(name: str, source: str, file_name: str, what: str) -> dict[str, Any] | None:
    """The content of a JSON file of a checkpoint; None if it has no such file."""
    if Path(source).is_dir():
        path = Path(source) / file_name
        return read_json(path, what) if os.path.lexists(path) else None
    found = cached_file_if_any(source, file_name, **loading_arguments(source))
    return None if found is None else read_json(Path(found), what)


def patch_size_of(name: str, config: PretrainedConfig) -> int:
    return _side(name, "patch_size", config.patch_size)


def own_image_size(name: str, config: PretrainedConfig) -> int:
    """Pixels per side in the config."""
    if hasattr(config, "image_size"):
        return _side(name, "image_size", config.image_size)
    return round(config.num_patches**0.5) * patch_size_of(name, config)  # NaFlex


def _side(name: str, key: str, value: int | list[int] | tuple[int, ...]) -> int:
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    if not sides or any(type(side) is not int or not 1 <= side <= LARGEST_SIDE for side in sides):
        raise UserError(f"{key} of the teacher {name} must be 1 to {LARGEST_SIDE:,} pixels, got {str(value)[:40]}")
    if len(set(sides)) != 1:
        raise UserError(f"{key} of the teacher {name} must be square, got {tuple(sides)}")
    return sides[0]


def _check_sizes(name: str, values: dict[str, Any]) -> None:
    for key in values.keys() & SIZES.keys():
        (least, most), value = SIZES[key], values[key]
        if value is None and key in OPTIONAL:
            continue
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{key} of the teacher {name} must be {least} to {most:,}, got {str(value)[:40]}")


# ---- normalisation ----


@dataclass(frozen=True)
class _Processor:
    """The settings of an image processor that matter here; None for its default."""

    do_normalize: bool | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None


def load_normalisation(name: str, source: str, family: Family, num_channels: int) -> Normalisation:
    """The normalisation in the checkpoint's processor file; without one, the family's."""
    settings = _read_processor(name, source)
    if settings is None:
        logger.info("the teacher %s has no preprocessor_config.json; using its family's mean and deviation", name)
        return _per_channel(*family.normalisation, num_channels)
    if settings.do_normalize is False:
        return _per_channel(0.0, 1.0, num_channels)
    mean, std = settings.image_mean, settings.image_std
    own = _per_channel(
        family.normalisation.mean if mean is None else mean,
        family.normalisation.std if std is None else std,
        num_channels,
    )
    if family.hub_normalisation_is_wrong and own == _per_channel(*HALF, num_channels):
        logger.info("the teacher %s has transformers' default mean; using the one that it was trained with", name)
        return _per_channel(*family.normalisation, num_channels)
    return own


def _read_processor(name: str, source: str) -> _Processor | None:
    """The image processor's settings, which processors of images and text keep inside another file."""
    where, what = "preprocessor_config.json", "the settings of an image processor"
    settings = read_checkpoint_json(name, source, where, what)
    if settings is None:
        where = "processor_config.json"
        settings = (read_checkpoint_json(name, source, where, what) or {}).get("image_processor")
    if settings is None:
        return None
    processor = build(_Processor, settings, f"{where} of the teacher {name}")
    for key, least, wanted in (("image_mean", -math.inf, "finite"), ("image_std", 0.0, "finite and above 0")):
        value = getattr(processor, key)
        numbers = [] if value is None else [value] if isinstance(value, float) else value
        if value == [] or not all(math.isfinite(number) and number > least for number in numbers):
            raise UserError(f"{key} in {where} of the teacher {name} must be {wanted}, got {str(value)[:60]}")
    return processor


def _per_channel(mean: float | Sequence[float], std: float | Sequence[float], num_channels: int) -> Normalisation:
    """One value per channel; if there are not as many, as for grey images, the mean over the channels."""

    def spread(value: float | Sequence[float]) -> tuple[float, ...]:
        values = (value,) if isinstance(value, (int, float)) else tuple(value)
        return values if len(values) == num_channels else (sum(values) / len(values),) * num_channels

    return Normalisation(spread(mean), spread(std))


# ---- the same teacher, or another ----


def same_teacher(one: str, other: str) -> bool | None:
    """Whether two names of --enc-type load the same teacher: the same name, or encoders of the same shape.

    None if one of them is a folder that does not exist.
    """
    if _source(one) == _source(other):
        return True
    shapes = (shape_of(one), shape_of(other))
    if None not in shapes:
        return shapes[0] == shapes[1]
    missing = any(shape is None and _is_path(name) for name, shape in zip((one, other), shapes, strict=True))
    return None if missing else False


def own_resolution(name: str) -> int | None:
    """Pixels per side in a teacher's config; None if it is not known here."""
    shape = shape_of(name)
    return None if shape is None else shape.image_size


def shape_of(name: str) -> Shape | None:
    """The shape of a short name or a folder; None for another hub name and for a folder without an encoder."""
    if name in TEACHERS:
        return Shape(*plugin(TEACHERS, name).shape())
    published = {known.hub_name: known.shape for known in PUBLISHED.values()}
    source = _source(name)
    if source in published:
        return published[source]
    if not Path(source).is_dir():
        return None
    try:
        config = load_config(name, source)
        width, depth = config.hidden_size, config.num_hidden_layers
        return Shape(config.model_type, width, depth, patch_size_of(name, config), own_image_size(name, config))
    except (UserError, AttributeError):
        return None


def _source(name: str) -> str:
    """A hub name, or the absolute path of a folder; other names unchanged."""
    try:
        source = resolve_teacher(name)
    except UserError:
        return name
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _is_path(name: str) -> bool:
    """Whether a name can only be a path; hub names have one slash."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


# ---- positions and tokens on another grid ----


def resample_positions(embeddings: nn.Module, own_grid: int, grid: int) -> None:
    """Resample the learned positions in an encoder's `embeddings` to another grid, in place.

    Bicubic with antialiasing, as in timm, REPA and HASTE; transformers would do it in each forward pass, without
    antialiasing. Rotary positions (DINOv3) are computed for any grid.
    """
    if own_grid == grid:
        return
    if isinstance(getattr(embeddings, "position_embeddings", None), nn.Parameter):
        table = resample_table(embeddings.position_embeddings[0], own_grid, grid, "bicubic")
        embeddings.position_embeddings = nn.Parameter(table[None], requires_grad=False)
    elif isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding):
        table = resample_table(embeddings.position_embedding.weight, own_grid, grid, "bicubic")
        embeddings.position_embedding = nn.Embedding.from_pretrained(table)
        embeddings.position_ids = torch.arange(len(table), device=table.device)[None]


@torch.no_grad()
def resample_table(table: Tensor, own_grid: int, grid: int, mode: str) -> Tensor:
    """(P + own_grid², C) to (P + grid², C), without changing the P positions of class and register tokens."""
    prefix, patches = table[: -(own_grid**2)], table[-(own_grid**2) :]
    return torch.cat([prefix, _resize(patches[None], own_grid, grid, mode)[0]])


class NaFlexPatches(nn.Module):
    """SigLIP 2 NaFlex's embeddings for square images of one size.

    It takes images (B, C, H, W), where the original takes their patches, a mask and shapes, and resamples the positions
    only once.
    """

    def __init__(self, embeddings: nn.Module, grid: int) -> None:
        super().__init__()
        self.patch_size = embeddings.patch_size
        self.patch_embedding = embeddings.patch_embedding
        table = embeddings.position_embedding.weight
        positions = resample_table(table, round(len(table) ** 0.5), grid, "bilinear")  # as in SigLIP 2
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, images: Tensor, spatial_shapes: None = None) -> Tensor:
        return self.patch_embedding(cut_patches(images, self.patch_size)) + self.positions


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, p·p·C), row by row, channels last in each patch."""
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, rows, p, columns, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def resample_tokens(tokens: Tensor, own_grid: int, grid: int) -> Tensor:
    """(..., own_grid², C) to (..., grid², C), bilinear over the grid, with antialiasing when it gets smaller."""
    if own_grid == grid:
        return tokens
    flat = tokens.reshape(-1, own_grid**2, tokens.shape[-1])
    return _resize(flat, own_grid, grid, "bilinear").reshape(*tokens.shape[:-2], grid**2, -1)


def _resize(tokens: Tensor, own_grid: int, grid: int, mode: str) -> Tensor:
    """(B, own_grid², C) to (B, grid², C), contiguous, computed in at least float32."""
    maps = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mT.unflatten(2, (own_grid, own_grid))
    maps = F.interpolate(maps, (grid, grid), mode=mode, antialias=True)
    return maps.flatten(2).mT.contiguous().to(tokens.dtype)
