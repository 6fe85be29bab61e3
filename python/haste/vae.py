"""The VAE between images and latents, and the shift and scale of the latents.

The model is trained on x = (z − shift)·scale, per channel, for latents z of the VAE: Stable Diffusion's has shift 0 and
scale 0.18215, MAR's KL-16 shift 0 and scale 0.2325; REPA-E's come with a file of statistics.
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

from haste import kl16
from haste.errors import UserError, in_one_line
from haste.io import loading_arguments, read_json, require_source
from haste.validation import build, shown
from haste.weights import load_weights, reason, require_weights

# --vae of REPA's and SiT's generate.py.
PUBLISHED_VAES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}

IMAGES_AT_A_TIME = 16  # in the VAE, whose activations at full resolution take gigabytes

MOST_CHANNELS, MOST_BLOCKS = 2**16, 16  # of a valid config


@dataclass(frozen=True)
class LatentFormat:
    """The format of latents.

    Attributes:
        vae: hub name, folder, or file of KL-16.
        factor: pixels per latent, along a side.
        shift, scale: one number per channel.
    """

    vae: str
    channels: int
    factor: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, name: str, stats: str | None = None) -> LatentFormat:
        """The format of a VAE by its name, from its config and optionally a file of statistics. Raises UserError."""
        source = resolve_vae(name)
        if source in PUBLISHED_VAES.values():  # known without the hub
            latents = replace(SD_LATENTS, vae=source)
        elif kl16.is_file_of_weights(source):
            kl16.load_kl16(source)  # refuses a file of anything else before data and models are built
            latents = replace(KL16_LATENTS, vae=source)
        else:
            config = _load_config(name, source)
            latents = cls(source, config.latent_channels, config.factor, *config.scaling())
        return latents if stats is None else latents.with_statistics(stats)

    @classmethod
    def from_dict(cls, values: Any, source: str = "the format of latents") -> LatentFormat:
        """The inverse of dataclasses.asdict, also through JSON. Raises UserError, naming `source`, for other values."""
        latents = build(cls, values, source)
        if not (1 <= latents.channels <= MOST_CHANNELS and 1 <= latents.factor <= 2**MOST_BLOCKS):
            limits = f"1 to {MOST_CHANNELS:,} and 1 to {2**MOST_BLOCKS:,}"
            found = f"{shown(latents.channels)} and {shown(latents.factor)}"
            raise UserError(f"channels and factor of {source} must be {limits}, got {found}")
        for name in ("shift", "scale"):
            numbers = getattr(latents, name)
            if len(numbers) != latents.channels or not all(map(math.isfinite, numbers)):
                raise UserError(f"{name} of {source} must be {latents.channels} finite numbers, got {shown(numbers)}")
        if 0 in latents.scale:
            raise UserError(f"scale of {source} must not be 0")
        return latents

    def with_statistics(self, stats: str) -> LatentFormat:
        """The same latents with the shift and scale of a file of statistics."""
        shift, scale = read_statistics(stats, self.channels)
        return replace(self, shift=shift, scale=scale)

    def input_size(self, resolution: int) -> int:
        """Latents per side of an image. Raises UserError unless `resolution` is a multiple of `factor`."""
        if resolution % self.factor:
            raise UserError(
                f"--resolution must be a multiple of {self.factor}, the pixels per latent of {self.vae}, got "
                f"{resolution}"
            )
        return resolution // self.factor

    def sample_posterior(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample latents (B, C, S, S), shifted and scaled, from moments (B, 2C, S, S): means, then deviations."""
        mean, std = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return (mean + std * noise - _by_channel(self.shift, mean)) * _by_channel(self.scale, mean)

    def restore(self, x: Tensor) -> Tensor:
        """Undo shift and scale: the latents z of the VAE."""
        return x / _by_channel(self.scale, x) + _by_channel(self.shift, x)


LOGVAR_LIMITS = (-30.0, 20.0)  # of LDM's posterior


def with_deviation(moments: Tensor) -> Tensor:
    """Moments (B, 2C, ...) with the standard deviation, exp(½·clip(logvar, −30, 20)), in place of the log-variance."""
    mean, logvar = moments.chunk(2, dim=1)
    return torch.cat([mean, (0.5 * logvar.clamp(*LOGVAR_LIMITS)).exp()], dim=1)


# The latents of REPA's vae-sd folders.
SD_LATENTS = LatentFormat(PUBLISHED_VAES["mse"], 4, 8, shift=(0.0,) * 4, scale=(0.18215,) * 4)

# The latents of MAR and xAR. Their VAE is a file, on no hub: without --vae it is looked for under this name.
KL16_LATENTS = LatentFormat(
    "kl16.ckpt", kl16.CHANNELS, kl16.FACTOR, shift=(0.0,) * kl16.CHANNELS, scale=(kl16.SCALE,) * kl16.CHANNELS
)


class VAE(nn.Module):
    """A frozen AutoencoderKL in fp32. Raises UserError if its weights cannot be loaded."""

    def __init__(self, latents: LatentFormat) -> None:
        super().__init__()
        self.latents = latents
        self._model = _load_model(latents.vae).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def train(self, mode: bool = True) -> VAE:
        """Stay in eval mode."""
        return super().train(False)

    def save(self, folder: Path) -> None:
        """Write it as diffusers' AutoencoderKL, for pipelines that scale latents by one number and do not shift them.

        Raises:
            UserError: the latents have a shift, or one scale for each channel.
        """
        scales, shifts = set(self.latents.scale), set(self.latents.shift)
        if len(scales) != 1 or shifts != {0.0}:
            found = f"scales {shown(self.latents.scale)} and shifts {shown(self.latents.shift)}"
            raise UserError(f"--vae must have latents of one scale and no shift, as pipelines of diffusers have, got "
                            f"{self.latents.vae} with {found}")  # fmt: skip
        self._model.register_to_config(
            scaling_factor=scales.pop(), shift_factor=None, latents_mean=None, latents_std=None
        )
        self._model.save_pretrained(folder)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, R, R) in [-1, 1] to moments (B, 2C, S, S): means, then standard deviations."""
        distributions = [self._model.encode(part).latent_dist for part in images.float().split(IMAGES_AT_A_TIME)]
        return torch.cat([torch.cat([d.mean, d.std], dim=1) for d in distributions])

    @torch.no_grad()
    def encode_to_logvar(self, images: Tensor) -> Tensor:
        """As `encode`, but with the logarithm of the variance in place of the deviation, not clipped: what the VAE's
        encoder returns, and what MS-COCO's public features hold."""
        parts = images.float().split(IMAGES_AT_A_TIME)
        return torch.cat([self._model.encode(part).latent_dist.parameters for part in parts])

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode shifted and scaled latents (B, C, S, S) to images (B, 3, R, R) in [-1, 1]."""
        latents = self.latents.restore(x.float())
        parts = [self._model.decode(part).sample for part in latents.split(IMAGES_AT_A_TIME)]
        return torch.cat(parts).clamp(-1, 1)


def resolve_vae(name: str) -> str:
    """What --vae names: mse, ema, a hub name, a folder with a config, or a file of weights. UserError for others."""
    if name in PUBLISHED_VAES:
        return PUBLISHED_VAES[name]
    folder = Path(name).expanduser()
    if name and folder.is_file():
        return str(folder.resolve())
    if name and folder.is_dir():
        inside = folder / "vae"  # the folder of a whole pipeline
        folder = inside if (inside / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise UserError(f"--vae must be a folder of save_pretrained(), got {name}, which has no config.json")
        return str(folder.resolve())
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/")
    if is_hub_name and not kl16.is_file_of_weights(name):
        return name
    raise UserError(
        f"--vae must be {', '.join(PUBLISHED_VAES)}, a hub name such as {PUBLISHED_VAES['mse']}, a folder of "
        f"save_pretrained(), or a file of MAR's KL-16, got {name!r}, which does not exist"
    )


def read_statistics(path: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read shift and scale from latents_bias and latents_scale, as in REPA-E's files, or from mean and std."""
    values = load_weights(Path(path).expanduser(), "--vae-stats")
    try:
        if "latents_scale" in values:
            shift, scale = values["latents_bias"], values["latents_scale"]
        else:
            shift, scale = values["mean"], 1 / values["std"].double()
        shift, scale = (tuple(value.double().flatten().tolist()) for value in (shift, scale))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--vae-stats must hold the tensors latents_scale and latents_bias, or mean and std, got {path}"
        ) from error
    if len(shift) != channels or len(scale) != channels:
        raise UserError(f"--vae-stats must be for {channels} channels, as the latents, got {len(scale)} in {path}")
    if not all(map(math.isfinite, shift + scale)) or 0.0 in scale:
        raise UserError(f"--vae-stats must hold finite numbers with a scale other than 0, got others in {path}")
    return shift, scale


@dataclass(frozen=True)
class _Config:
    """The relevant part of an AutoencoderKL's config.json, with diffusers' defaults."""

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
        """Shift and scale, as in diffusers' pipelines."""
        factor = self.scaling_factor or 0.18215
        if self.latents_mean is not None and self.latents_std is not None:
            return tuple(self.latents_mean), tuple(factor / deviation for deviation in self.latents_std)
        return (self.shift_factor or 0.0,) * self.latent_channels, (factor,) * self.latent_channels

    def check(self, name: str) -> None:
        """Raise UserError for invalid sizes, and for statistics that do not fit the channels."""

        def require(valid: bool, what: str, value: Any) -> None:
            if not valid:
                raise UserError(f"{what} of the VAE {name}, got {shown(value)}")

        blocks, most = self.block_out_channels, f"1 to {MOST_CHANNELS:,}"
        require(1 <= self.latent_channels <= MOST_CHANNELS, f"latent_channels must be {most}", self.latent_channels)
        require(1 <= len(blocks) <= MOST_BLOCKS, f"block_out_channels must be 1 to {MOST_BLOCKS} numbers", blocks)
        require(all(1 <= size <= MOST_CHANNELS for size in blocks), f"block_out_channels must be {most}", blocks)
        layers = self.layers_per_block
        require(1 <= layers <= MOST_BLOCKS, f"layers_per_block must be 1 to {MOST_BLOCKS}", layers)
        for key in ("latents_mean", "latents_std"):
            values = getattr(self, key)
            right = values is None or (len(values) == self.latent_channels and all(map(math.isfinite, values)))
            require(right, f"{key} must be {self.latent_channels} finite numbers", values)
        require(0.0 not in (self.latents_std or ()), "latents_std must not be 0", self.latents_std)
        for key in ("scaling_factor", "shift_factor"):
            require(math.isfinite(getattr(self, key) or 0.0), f"{key} must be finite", getattr(self, key))


def _load_config(name: str, source: str) -> _Config:
    require_source(name, source, "--vae")
    what = "the config of a VAE"
    if Path(source).is_dir():
        config = read_json(Path(source) / "config.json", what)
    else:
        from diffusers import AutoencoderKL

        try:
            config = AutoencoderKL.load_config(source, **loading_arguments(source))
        except Exception as error:  # of diffusers or the hub
            raise UserError(f"the VAE {name} cannot be loaded: {in_one_line(error)}") from error
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"the VAE {name} must be an AutoencoderKL, got the class {shown(kind)}")
    if config.get("quantization_config") is not None:
        raise UserError(f"the VAE {name} must have weights in float32, float16 or bfloat16, got quantised ones")
    checked = build(_Config, config, f"the config of the VAE {name}")
    checked.check(name)
    return checked


def _load_model(source: str) -> nn.Module:
    if kl16.is_file_of_weights(source):
        return kl16.load_kl16(resolve_vae(source))

    from diffusers import AutoencoderKL  # imported here, as it takes a second

    _load_config(source, source)
    if Path(source).is_dir():

        def build_model() -> nn.Module:
            return AutoencoderKL.from_config(AutoencoderKL.load_config(source, local_files_only=True))

        require_weights(Path(source), f"the VAE {source}", build_model)
    try:
        model, report = AutoencoderKL.from_pretrained(source, output_loading_info=True, **loading_arguments(source))
    except Exception as error:  # of diffusers, safetensors or the hub
        raise UserError(f"the VAE {source} cannot be loaded: {reason(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"the VAE {source} cannot be loaded: its weights lack {report['missing_keys'][0]}")
    return model.float()


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
