"""A frozen vision transformer that shows its attention and its features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import cached_file

from haste.errors import UserError, in_one_line
from haste.teachers.families import VISION_TOWERS, Family, find_family, find_layers
from haste.teachers.names import resolve_teacher
from haste.teachers.recorder import ATTENTION_NAME, QueriesKeys, record

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class TeacherOutput:
    """What one teacher says about one batch.

    queries_keys: for each wanted layer, in the order asked for, (q, k), each (B, H, prefix + N, D).
    prefix: number of leading class and register tokens in q and k.
    patch_tokens: (B, N, C), the last layer's patch tokens after the final norm, without the prefix; None if features
        were not asked for.
    """

    queries_keys: list[QueriesKeys]
    prefix: int
    patch_tokens: torch.Tensor | None


class VisionTeacher(nn.Module):
    """Runs the encoder without gradient, in eval mode, on the student's own pictures.

    Make one with `from_pretrained`. The pictures are resized (bicubic, as HASTE and REPA do) so that the teacher has
    `grid` x `grid` patches, and normalised with the encoder's own mean and standard deviation.
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Family,
        layers: Sequence[int],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        features: bool = True,
    ) -> None:
        super().__init__()
        config = encoder.config
        blocks = find_layers(encoder, config.num_hidden_layers)
        if not features:
            # Nothing after the last recorded layer is needed, so it need not exist.
            del blocks[max(layers) + 1 :]
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.features = features
        self.image_size = image_size
        self.grid = image_size // config.patch_size
        self.prefix = family.prefix_tokens(config)
        self.width: int = config.hidden_size
        self.num_channels: int = config.num_channels
        self._family = family
        self._layer_of_module = {module: layer for layer in set(layers) for module in blocks[layer].modules()}
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        layers: Sequence[int] = (),
        grid: int | None = None,
        image_size: int | None = None,
        features: bool = True,
    ) -> VisionTeacher:
        """Load a teacher from a local folder, a hub name, or one of HASTE's and REPA's short names.

        layers: 0-based layers whose q and k are wanted.
        grid: patches per side that the student has; the teacher's positions are resampled to it.
        image_size: pixels per side that the teacher sees. Default: grid x patch size, or the encoder's own size when
            no grid is given.
        features: whether the final patch tokens are wanted; without them, later layers are dropped.

        Raises UserError for a folder that is missing or no model, an unknown family, a layer that the encoder does
        not have, and an image_size whose grid is not the student's.
        """
        source = resolve_teacher(name)
        config = _load_config(name, source)
        family = find_family(name, config)
        _check_layers(name, layers, config.num_hidden_layers)
        if not layers and not features:
            raise ValueError("a teacher of which neither layers nor features are wanted has nothing to do")
        image_size = _choose_image_size(name, config, grid, image_size)
        mean, std = _load_normalisation(source, config.num_channels)
        return cls(_load_encoder(name, source, family), family, layers, image_size, mean, std, features)

    def train(self, mode: bool = True) -> VisionTeacher:
        """A teacher stays in eval mode, whatever its owner does."""
        return super().train(False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, num_channels, image_size, image_size), normalised."""
        if images.shape[1] == 1 and self.num_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.num_channels:
            raise UserError(
                f"the pictures have {images.shape[1]} channels and the teacher takes {self.num_channels}; "
                "they must agree, or the pictures must be grey"
            )
        images = ((images + 1) / 2 - self.mean) / self.std
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic")
        return images

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> TeacherOutput:
        """images: (B, C, H, W), float, in [-1, 1], of any size."""
        pixels = self.preprocess(images)
        arguments = self._family.forward_arguments(pixels, self.grid**2)
        with record(self._layer_of_module) as recording:
            tokens = self.encoder(pixels, **arguments).last_hidden_state
        return TeacherOutput(
            queries_keys=[recording.queries_keys[layer] for layer in self.layers],
            prefix=self.prefix,
            patch_tokens=self._finish(tokens) if self.features else None,
        )

    def _finish(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._family.final_norm is not None:
            tokens = getattr(self.encoder, self._family.final_norm)(tokens)
        return tokens[:, self.prefix :]


def _load_config(name: str, source: str) -> PretrainedConfig:
    """The config of the picture side of the checkpoint."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"the teacher {name} cannot be loaded: {in_one_line(error)}") from error
    if config.model_type in VISION_TOWERS:
        return config.vision_config
    return config


def _load_encoder(name: str, source: str, family: Family) -> nn.Module:
    try:
        model = AutoModel.from_pretrained(source, attn_implementation=ATTENTION_NAME)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the teacher {name} cannot be loaded: {in_one_line(error)}") from error
    encoder = getattr(model, "vision_model", model)  # the text side of a two-tower model is dropped here
    if family.masks_patches:
        encoder.config.mask_ratio = 0.0
    return encoder


def _check_layers(name: str, layers: Sequence[int], depth: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise UserError(
            f"the layer map asks for layer {outside[0]} of the teacher {name}, which has {depth} layers; "
            f"teacher layers must be 0 to {depth - 1}"
        )


def _choose_image_size(name: str, config: PretrainedConfig, grid: int | None, image_size: int | None) -> int:
    patch = config.patch_size
    if image_size is None:
        return config.image_size if grid is None else grid * patch
    if image_size % patch:
        raise UserError(
            f"--teacher-resolution is {image_size}; it must be a multiple of {patch}, the patch of {name}"
        )
    own = image_size // patch
    if grid is not None and own != grid:
        raise UserError(
            f"the teacher {name} at {image_size} pixels has {own} x {own} tokens and the student has {grid} x {grid}; "
            f"--teacher-resolution {grid * patch} would fit"
        )
    return image_size


def _load_normalisation(source: str, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, one per channel: the checkpoint's own, or ImageNet's where it has none."""
    file = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = {}
    if file is not None:
        with open(file) as stream:
            settings = json.load(stream)
    mean = _per_channel(settings.get("image_mean", IMAGENET_MEAN), num_channels)
    std = _per_channel(settings.get("image_std", IMAGENET_STD), num_channels)
    return mean, std


def _per_channel(value: float | Sequence[float], num_channels: int) -> list[float]:
    values = [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) == num_channels:
        return values
    return [sum(values) / len(values)] * num_channels
