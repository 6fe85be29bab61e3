"""The autoencoder between images and latents, and the numbers that make its latents fit for diffusion.

What is diffused is x = (z − shift)·scale, channel by channel, for latents z of the VAE: Stable Diffusion's has shift 0
and scale 0.18215; REPA-E's come with a file of statistics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haste.errors import UserError, in_one_line
from haste.io import in_bytes, read_json
from haste.validation import build
from haste.weights import load_weights, loading_arguments, reason, require_source, weights_size

# --vae of REPA's and SiT's generate.py.
PUBLISHED_VAES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}

# A VAE's activations at full resolution take gigabytes, so the images go through it in parts.
IMAGES_AT_A_TIME = 16

MOST_CHANNELS, MOST_BLOCKS = 2**16, 16  # of a config that can be meant


@dataclass(frozen=True)
class LatentFormat:
    """vae: hub name or folder. channels: of the latents. factor: pixels per latent, along a side. shift, scale: one
    number per channel."""

    vae: str
    channels: int
    factor: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, name: str, stats: str | None = None) -> LatentFormat:
        """Of a VAE, from its config alone. name: mse, ema, a hub name or a folder; stats: a file of statistics.

        Raises UserError for a VAE that does not exist or is no AutoencoderKL, and for a file that does not fit it.
        """
        source = resolve_vae(name)
        if source in PUBLISHED_VAES.values():  # known, also where the hub is out of reach
            latents = replace(SD_LATENTS, vae=source)
        else:
            config = _load_config(name, source)
            latents = cls(source, config.latent_channels, config.factor, *config.scaling())
        return latents if stats is None else latents.with_statistics(stats)

    @classmethod
    def from_dict(cls, values: Any, source: str = "the format of latents") -> LatentFormat:
        """The inverse of dataclasses.asdict, also by way of JSON, which knows no tuples.

        Raises UserError, naming `source`, for values that are no such format.
        """
        latents = build(cls, values, source)
        if not (1 <= latents.channels <= MOST_CHANNELS and 1 <= latents.factor <= 2**MOST_BLOCKS):
            limits = f"1 to {MOST_CHANNELS:,} and 1 to {2**MOST_BLOCKS:,}"
            raise UserError(f"channels and factor of {source} must be {limits}, and are not")
        for name in ("shift", "scale"):
            numbers = getattr(latents, name)
            if len(numbers) != latents.channels or not all(map(math.isfinite, numbers)):
                raise UserError(f"{name} of {source} must be one number for each of {latents.channels} channels")
        if 0 in latents.scale:
            raise UserError(f"scale of {source} must not be 0")
        return latents

    def with_statistics(self, stats: str) -> LatentFormat:
        """The same latents, shifted and scaled by a file of statistics."""
        shift, scale = read_statistics(stats, self.channels)
        return replace(self, shift=shift, scale=scale)

    def input_size(self, resolution: int) -> int:
        """Latents per side of an image; UserError if that is no whole number."""
        if resolution % self.factor:
            raise UserError(
                f"--resolution is {resolution}; it must be a multiple of {self.factor}, the pixels per latent of "
                f"the VAE {self.vae}"
            )
        return resolution // self.factor

    def sample_posterior(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample latents (B, C, S, S), shifted and scaled, from moments (B, 2C, S, S): means, standard deviations."""
        mean, std = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return (mean + std * noise - _by_channel(self.shift, mean)) * _by_channel(self.scale, mean)

    def restore(self, x: Tensor) -> Tensor:
        """The VAE's latents z of what was diffused."""
        return x / _by_channel(self.scale, x) + _by_channel(self.shift, x)


# What REPA's vae-sd folders hold.
SD_LATENTS = LatentFormat(PUBLISHED_VAES["mse"], 4, 8, shift=(0.0,) * 4, scale=(0.18215,) * 4)


class VAE(nn.Module):
    """A frozen AutoencoderKL in fp32. UserError if its weights cannot be loaded."""

    def __init__(self, latents: LatentFormat) -> None:
        super().__init__()
        self.latents = latents
        self._model = _load_model(latents.vae).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def train(self, mode: bool = True) -> VAE:
        """Stays in eval mode, whatever its owner does."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] to moments (B, 2C, S, S): means, then standard deviations."""
        distributions = [self._model.encode(part).latent_dist for part in images.float().split(IMAGES_AT_A_TIME)]
        return torch.cat([torch.cat([d.mean, d.std], dim=1) for d in distributions])

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """What was diffused, (B, C, S, S), to images (B, 3, R, R) in [-1, 1]."""
        latents = self.latents.restore(x.float())
        parts = [self._model.decode(part).sample for part in latents.split(IMAGES_AT_A_TIME)]
        return torch.cat(parts).clamp(-1, 1)


def resolve_vae(name: str) -> str:
    """mse and ema become their hub names; a folder must hold a config; a hub name stays. UserError for others."""
    if name in PUBLISHED_VAES:
        return PUBLISHED_VAES[name]
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        inside = folder / "vae"  # the folder of a whole pipeline
        folder = inside if (inside / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise UserError(f"--vae is {name}, a folder without a config.json; save one there with save_pretrained()")
        return str(folder.resolve())
    if name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/"):
        return name
    raise UserError(
        f"--vae is {name!r}, which does not exist; it must be {' or '.join(PUBLISHED_VAES)}, a hub name such as "
        f"{PUBLISHED_VAES['mse']}, or a folder written by save_pretrained()"
    )


def read_statistics(path: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale, one number per channel, from a file of tensors: latents_bias and latents_scale as REPA-E's
    have them, or mean and std. UserError for any other content."""
    values = load_weights(Path(path).expanduser(), "--vae-stats")
    try:
        if "latents_scale" in values:
            shift, scale = values["latents_bias"], values["latents_scale"]
        else:
            shift, scale = values["mean"], 1 / values["std"].double()
        shift, scale = (tuple(value.double().flatten().tolist()) for value in (shift, scale))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--vae-stats is {path}; it must hold the tensors latents_scale and latents_bias, or mean and std"
        ) from error
    if len(shift) != channels or len(scale) != channels:
        raise UserError(f"--vae-stats is {path}, for {len(scale)} channels; it must be for {channels}, as the latents")
    if not all(map(math.isfinite, shift + scale)) or 0.0 in scale:
        raise UserError(f"--vae-stats is {path}; its numbers must be finite, and those it divides by not 0")
    return shift, scale


@dataclass(frozen=True)
class _Config:
    """What matters here of an AutoencoderKL's config.json, with diffusers' defaults."""

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [64])
    layers_per_block: int = 1
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Shift and scale, as diffusers' pipelines read them."""
        factor = self.scaling_factor or 0.18215
        if self.latents_mean is not None and self.latents_std is not None:
            return tuple(self.latents_mean), tuple(factor / deviation for deviation in self.latents_std)
        return (self.shift_factor or 0.0,) * self.latent_channels, (factor,) * self.latent_channels

    def check(self, name: str) -> None:
        """UserError for sizes that no VAE has, and for statistics that do not fit its channels."""
        sizes = [self.latent_channels, *self.block_out_channels]
        if not (all(1 <= size <= MOST_CHANNELS for size in sizes) and 1 <= len(self.block_out_channels) <= MOST_BLOCKS):
            raise UserError(
                f"the VAE {name} has {str(self.latent_channels)[:20]} channels and blocks of "
                f"{str(self.block_out_channels)[:40]}; they must be 1 to {MOST_CHANNELS:,}, in at most {MOST_BLOCKS} "
                "blocks"
            )
        if not 1 <= self.layers_per_block <= MOST_BLOCKS:
            raise UserError(f"the VAE {name} has layers_per_block {str(self.layers_per_block)[:20]}; it must be 1 to "
                            f"{MOST_BLOCKS}")  # fmt: skip
        listed = [values for values in (self.latents_mean, self.latents_std) if values is not None]
        if any(len(values) != self.latent_channels for values in listed) or 0.0 in (self.latents_std or ()):
            raise UserError(f"the VAE {name} has latents_mean and latents_std that are not one number per channel")
        numbers = [self.scaling_factor, self.shift_factor, *(number for values in listed for number in values)]
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise UserError(f"the VAE {name} has a scaling that is not finite")


def _load_config(name: str, source: str) -> _Config:
    require_source(name, source, "--vae")
    what = "the config of a VAE"
    if Path(source).is_dir():
        config = read_json(Path(source) / "config.json", what)
    else:
        from diffusers import AutoencoderKL

        try:
            config = AutoencoderKL.load_config(source, **loading_arguments(source))
        except Exception as error:  # diffusers', the hub's own errors
            raise UserError(f"the VAE {name} cannot be loaded: {in_one_line(error)}") from error
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"the VAE {name} is of the class {str(kind)[:40]}; it must be an AutoencoderKL")
    if config.get("quantization_config") is not None:
        raise UserError(f"the VAE {name} is quantised; its weights must be in float32, float16 or bfloat16")
    checked = build(_Config, config, f"the config of the VAE {name}")
    checked.check(name)
    return checked


def _load_model(source: str) -> nn.Module:
    from diffusers import AutoencoderKL  # takes a second, and pixels need none of it

    _load_config(source, source)
    if Path(source).is_dir():
        _require_weights(source)
    try:
        model, report = AutoencoderKL.from_pretrained(source, output_loading_info=True, **loading_arguments(source))
    except Exception as error:  # diffusers', safetensors', the hub's own errors
        raise UserError(f"the VAE {source} cannot be loaded: {reason(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"the VAE {source} cannot be loaded: its weights lack {report['missing_keys'][0]}")
    return model.float()


def _require_weights(source: str) -> None:
    """UserError if the config of a folder asks for more numbers than its files have bytes: it would be given memory
    before they are missed."""
    from diffusers import AutoencoderKL

    size = weights_size(Path(source), f"the VAE {source}")
    try:
        with torch.device("meta"):
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(source, local_files_only=True))
    except Exception as error:  # sizes that do not go together
        raise UserError(f"the VAE {source} cannot be loaded: {in_one_line(error)}") from error
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > size:
        raise UserError(
            f"the VAE {source} cannot be loaded: its config.json asks for {numbers:,} numbers, and its weights "
            f"(*.safetensors, *.bin) lack most of them: they have {in_bytes(size)}"
        )


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
