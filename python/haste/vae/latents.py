"""The format of latents: their channels, and the shift and scale of each.

The model is trained on x = (z − shift)·scale, per channel, for latents z of the VAE: Stable Diffusion's has shift 0 and
scale 0.18215, MAR's KL-16 shift 0 and scale 0.2325; others come with statistics, in their config or in a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste.errors import UserError
from haste.vae import ldm
from haste.vae.kinds import MOST_BLOCKS, MOST_CHANNELS
from haste.vae.loading import PUBLISHED_VAES, read_kind, resolve_vae
from haste.validation import build, shown
from haste.weights import load_weights


@dataclass(frozen=True)
class LatentFormat:
    """The format of latents.

    Attributes:
        vae: hub name, folder, or file of LDM's.
        factor: pixels per latent, along a side.
        shift, scale: one number per channel.
    """

    vae: str
    channels: int
    factor: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, name: str, stats: str | None = None, resolution: int | None = None) -> LatentFormat:
        """The format of a VAE by its name, from its config and optionally a file of statistics. Raises UserError, also
        for a VAE that takes images of another resolution only."""
        source = resolve_vae(name)
        if source in PUBLISHED_VAES.values():  # known without the hub
            latents = replace(SD_LATENTS, vae=source)
        else:
            kind = read_kind(name, source)
            if resolution is not None:
                kind.check_resolution(name, resolution)
            latents = cls(source, kind.channels, kind.factor, *kind.scaling())
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
    "kl16.ckpt", ldm.KL16_CHANNELS, 16, shift=(0.0,) * ldm.KL16_CHANNELS, scale=(ldm.KL16_SCALE,) * ldm.KL16_CHANNELS
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


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
