"""The autoencoders of diffusers that --vae may be: what their configs say, and how they encode and decode.

A kind is a class of diffusers as a dataclass of the relevant part of its config.json, with diffusers' defaults. Images
are in [-1, 1] here, whatever the class takes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from haste.errors import UserError
from haste.validation import shown

MOST_CHANNELS, MOST_BLOCKS = 2**16, 16  # of a valid config
MOST_LAYERS, MOST_PATCHES = 128, 64  # of a transformer in an RAE, along a side of its grid

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Kind(ABC):
    """An autoencoder by its config.

    Attributes:
        has_posterior: whether it encodes to a distribution, from which latents are sampled, or to the latents.
        in_pipelines: whether a DiTPipeline decodes by it as haste does.
    """

    has_posterior: ClassVar[bool]
    in_pipelines: ClassVar[bool]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the latents."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent, along a side."""

    @property
    def resolution(self) -> int | None:
        """The only size of images in pixels; None for any multiple of the factor."""
        return None

    @abstractmethod
    def scaling(self) -> tuple[Numbers, Numbers]:
        """Shift and scale of each channel."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise UserError for invalid sizes, and for statistics that do not fit the channels."""

    def check_resolution(self, name: str, resolution: int) -> None:
        """Raise UserError for another than the only resolution."""
        if self.resolution not in (None, resolution):
            raise UserError(f"--resolution must be {self.resolution}, the only one of the VAE {name}, got {resolution}")

    @abstractmethod
    def encode(self, model: nn.Module, images: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, S, S) of images (B, 3, R, R); latents (B, C, S, S) without a posterior."""

    @abstractmethod
    def decode(self, model: nn.Module, latents: Tensor) -> Tensor:
        """Images of latents (B, C, S, S), not clamped."""


@dataclass(frozen=True)
class KL(Kind):
    """AutoencoderKL: Stable Diffusion's, and those of REPA-E with the statistics of their latents in the config."""

    has_posterior = True
    in_pipelines = True

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [64])
    layers_per_block: int = 1
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def scaling(self) -> tuple[Numbers, Numbers]:
        """As in diffusers' pipelines. But beside statistics the class's default of 0.18215 is a scale that nobody set,
        and latents are (z − mean)/std, as REPA-E's are trained on."""
        default = 0.18215
        if self.latents_mean is not None and self.latents_std is not None:
            factor = 1.0 if self.scaling_factor in (None, 0.0, default) else self.scaling_factor
            return tuple(self.latents_mean), tuple(factor / deviation for deviation in self.latents_std)
        scale = self.scaling_factor or default
        return (self.shift_factor or 0.0,) * self.latent_channels, (scale,) * self.latent_channels

    def check(self, name: str) -> None:
        _require_channels(self.latent_channels, name)
        _require_widths("block_out_channels", self.block_out_channels, name)
        layers = self.layers_per_block
        _require(1 <= layers <= MOST_BLOCKS, f"layers_per_block must be 1 to {MOST_BLOCKS}", layers, name)
        for key in ("latents_mean", "latents_std"):
            values = getattr(self, key)
            right = values is None or (len(values) == self.latent_channels and all(map(math.isfinite, values)))
            _require(right, f"{key} must be {self.latent_channels} finite numbers", values, name)
        _require(0.0 not in (self.latents_std or ()), "latents_std must not be 0", self.latents_std, name)
        for key in ("scaling_factor", "shift_factor"):
            _require(math.isfinite(getattr(self, key) or 0.0), f"{key} must be finite", getattr(self, key), name)

    def encode(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.encode(images).latent_dist.parameters  # type: ignore[operator]

    def decode(self, model: nn.Module, latents: Tensor) -> Tensor:
        return model.decode(latents).sample  # type: ignore[operator]


@dataclass(frozen=True)
class DC(Kind):
    """AutoencoderDC, the deep compression autoencoder (DC-AE, arXiv 2410.10733): 32 or more pixels per latent."""

    has_posterior = False
    in_pipelines = True

    latent_channels: int = 32
    encoder_block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512, 1024, 1024])
    decoder_block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512, 1024, 1024])
    encoder_layers_per_block: list[int] = field(default_factory=lambda: [2, 2, 2, 3, 3, 3])
    decoder_layers_per_block: list[int] = field(default_factory=lambda: [3, 3, 3, 3, 3, 3])
    scaling_factor: float | None = None

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factor(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def scaling(self) -> tuple[Numbers, Numbers]:
        return (0.0,) * self.latent_channels, (self.scaling_factor or 1.0,) * self.latent_channels

    def check(self, name: str) -> None:
        _require_channels(self.latent_channels, name)
        for part in ("encoder", "decoder"):
            widths = getattr(self, f"{part}_block_out_channels")
            _require_widths(f"{part}_block_out_channels", widths, name)
            layers = getattr(self, f"{part}_layers_per_block")
            right = len(layers) == len(widths) and all(0 <= count <= MOST_BLOCKS for count in layers)
            _require(right, f"{part}_layers_per_block must be {len(widths)} of 0 to {MOST_BLOCKS}", layers, name)
        same = len(self.encoder_block_out_channels) == len(self.decoder_block_out_channels)
        what = f"decoder_block_out_channels must be {len(self.encoder_block_out_channels)} numbers, as the encoder's"
        _require(same, what, self.decoder_block_out_channels, name)
        _require(math.isfinite(self.scaling_factor or 0.0), "scaling_factor must be finite", self.scaling_factor, name)

    def encode(self, model: nn.Module, images: Tensor) -> Tensor:
        return model.encode(images).latent  # type: ignore[operator]

    def decode(self, model: nn.Module, latents: Tensor) -> Tensor:
        return model.decode(latents).sample  # type: ignore[operator]


@dataclass(frozen=True)
class RAE(Kind):
    """AutoencoderRAE, the representation autoencoder (arXiv 2510.11690): latents are a frozen encoder's tokens.

    The class itself shifts and scales them, by statistics that may differ at each position, so that haste does not.
    """

    has_posterior = False
    in_pipelines = False

    encoder_hidden_size: int = 768
    encoder_patch_size: int = 14
    encoder_num_hidden_layers: int = 12
    encoder_input_size: int = 224
    decoder_hidden_size: int = 512
    decoder_intermediate_size: int = 2048
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    patch_size: int = 16
    num_channels: int = 3
    reshape_to_2d: bool = True

    @property
    def channels(self) -> int:
        return self.encoder_hidden_size

    @property
    def factor(self) -> int:
        return self.patch_size

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.encoder_input_size // self.encoder_patch_size

    @property
    def resolution(self) -> int:
        return self.patch_size * self.grid

    def scaling(self) -> tuple[Numbers, Numbers]:
        return (0.0,) * self.channels, (1.0,) * self.channels

    def check(self, name: str) -> None:
        for key in ("encoder_hidden_size", "decoder_hidden_size", "decoder_intermediate_size", "encoder_patch_size",
                    "encoder_input_size", "patch_size", "decoder_num_attention_heads"):  # fmt: skip
            value = getattr(self, key)
            _require(1 <= value <= MOST_CHANNELS, f"{key} must be 1 to {MOST_CHANNELS:,}", value, name)
        for key in ("encoder_num_hidden_layers", "decoder_num_hidden_layers"):
            value = getattr(self, key)
            _require(1 <= value <= MOST_LAYERS, f"{key} must be 1 to {MOST_LAYERS}", value, name)
        right = 1 <= self.grid <= MOST_PATCHES
        what = f"encoder_input_size must be 1 to {MOST_PATCHES} times encoder_patch_size, {self.encoder_patch_size}"
        _require(right, what, self.encoder_input_size, name)
        _require(self.num_channels == 3, "num_channels must be 3", self.num_channels, name)
        _require(self.reshape_to_2d, "reshape_to_2d must be true", self.reshape_to_2d, name)

    def encode(self, model: nn.Module, images: Tensor) -> Tensor:
        self.check_resolution("of --vae", images.shape[-1])
        return model.encode((images + 1) / 2).latent  # type: ignore[operator]

    def decode(self, model: nn.Module, latents: Tensor) -> Tensor:
        self.check_resolution("of --vae", self.patch_size * latents.shape[-1])
        return model.decode(latents).sample * 2 - 1  # type: ignore[operator]


KINDS: dict[str, type[Kind]] = {"AutoencoderKL": KL, "AutoencoderDC": DC, "AutoencoderRAE": RAE}


def _require(valid: bool, what: str, value: Any, name: str) -> None:
    if not valid:
        raise UserError(f"{what} of the VAE {name}, got {shown(value)}")


def _require_channels(channels: int, name: str) -> None:
    _require(1 <= channels <= MOST_CHANNELS, f"latent_channels must be 1 to {MOST_CHANNELS:,}", channels, name)


def _require_widths(key: str, widths: list[int], name: str) -> None:
    _require(1 <= len(widths) <= MOST_BLOCKS, f"{key} must be 1 to {MOST_BLOCKS} numbers", widths, name)
    right = all(1 <= width <= MOST_CHANNELS for width in widths)
    _require(right, f"{key} must be 1 to {MOST_CHANNELS:,}", widths, name)
