"""A frozen autoencoder between images and latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.vae.latents import LOGVAR_LIMITS, LatentFormat, with_deviation
from haste.vae.loading import load_autoencoder
from haste.validation import shown

IMAGES_AT_A_TIME = 16  # whose activations at full resolution take gigabytes


class VAE(nn.Module):
    """A frozen autoencoder of diffusers in fp32. Raises UserError if its weights cannot be loaded."""

    def __init__(self, latents: LatentFormat) -> None:
        super().__init__()
        self.latents = latents
        self._kind, model = load_autoencoder(latents.vae)
        self._model = model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self._model.device  # type: ignore[return-value]

    @property
    def class_name(self) -> str:
        """Of diffusers."""
        return type(self._model).__name__

    def train(self, mode: bool = True) -> VAE:
        """Stay in eval mode."""
        return super().train(False)

    def save(self, folder: Path) -> None:
        """Write it as diffusers' class, for pipelines that scale latents by one number and do not shift them.

        Raises:
            UserError: the latents have a shift, or one scale for each channel, or pipelines do not decode by the class.
        """
        if not self._kind.in_pipelines:
            raise UserError(f"--vae must be none, for the transformer alone, or an AutoencoderKL or AutoencoderDC, as "
                            f"pipelines of diffusers take, got the {self.class_name} {self.latents.vae}")  # fmt: skip
        scales, shifts = set(self.latents.scale), set(self.latents.shift)
        if len(scales) != 1 or shifts != {0.0}:
            found = f"scales {shown(self.latents.scale)} and shifts {shown(self.latents.shift)}"
            raise UserError(f"--vae must have latents of one scale and no shift, as pipelines of diffusers have, got "
                            f"{self.latents.vae} with {found}")  # fmt: skip
        others = {"shift_factor", "latents_mean", "latents_std"} & set(self._model.config)  # type: ignore[arg-type]
        self._model.register_to_config(scaling_factor=scales.pop(), **dict.fromkeys(others))  # type: ignore[operator]
        self._model.save_pretrained(folder)  # type: ignore[operator]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, R, R) in [-1, 1] to moments (B, 2C, S, S): means, then standard deviations, which are 0
        of an autoencoder without a posterior."""
        if self._kind.has_posterior:
            return torch.cat([with_deviation(part) for part in self._encode(images)])
        return torch.cat([torch.cat([part, torch.zeros_like(part)], dim=1) for part in self._encode(images)])

    @torch.no_grad()
    def encode_to_logvar(self, images: Tensor) -> Tensor:
        """As `encode`, but with the logarithm of the variance in place of the deviation, not clipped: what the VAE's
        encoder returns, and what MS-COCO's public features hold. It is −30, the least, without a posterior."""
        if self._kind.has_posterior:
            return torch.cat(self._encode(images))
        parts = self._encode(images)
        return torch.cat([torch.cat([part, torch.full_like(part, LOGVAR_LIMITS[0])], dim=1) for part in parts])

    def _encode(self, images: Tensor) -> list[Tensor]:
        return [self._kind.encode(self._model, part) for part in images.float().split(IMAGES_AT_A_TIME)]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode shifted and scaled latents (B, C, S, S) to images (B, 3, R, R) in [-1, 1]."""
        latents = self.latents.restore(x.float())
        parts = [self._kind.decode(self._model, part) for part in latents.split(IMAGES_AT_A_TIME)]
        return torch.cat(parts).clamp(-1, 1)
