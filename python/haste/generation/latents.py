"""What lies between a student and pictures: nothing for pixels, or the decoder of a VAE."""

from __future__ import annotations

from dataclasses import replace

from haste.errors import UserError
from haste.generation.student import Student
from haste.vae import PUBLISHED_VAES, LatentFormat

PICTURE_CHANNELS = (1, 3)
PUBLISHED = "ema"  # what the generate.py of REPA, HASTE and SiT decode with


def latent_format(student: Student, vae: str | None = None) -> LatentFormat | None:
    """How a student's latents become pictures; None for one that draws pixels.

    vae: as --vae names it, in place of the one that the checkpoint names. Of a checkpoint that names none, as other
    trainers write them, one or three channels are pixels, and others the latents of this VAE.
    The two VAEs of Stable Diffusion make the same latents, so those do not tell by which they are decoded: it is the
    published one, unless the run was told another. So it is the same before and after a run of REPA's is gone on with.
    Raises UserError for a VAE that does not exist or does not fit.
    """
    channels = student.model.in_channels
    if "latents" not in student.recorded:
        if vae is None and channels in PICTURE_CHANNELS:
            return None
        latents = LatentFormat.of(vae or PUBLISHED)
        if latents.channels != channels:
            raise UserError(
                f"--vae is {vae or PUBLISHED}, whose latents have {latents.channels} channels; it must have the "
                f"{channels} that the model draws"
            )
        return latents
    saved = student.recorded["latents"]
    if saved is None:
        if vae is not None:
            raise UserError(f"--vae is {vae}, and the model draws pixels, which need none")
        return None
    latents = LatentFormat.from_dict(saved, f"latents of {student.checkpoint}")
    if vae is None and student.config.vae is None and latents.vae in PUBLISHED_VAES.values():
        vae = PUBLISHED
    return latents if vae is None else with_other_decoder(latents, vae)


def with_other_decoder(latents: LatentFormat, vae: str) -> LatentFormat:
    """The latents that a model was trained on, shift and scale included, decoded by another VAE."""
    other = LatentFormat.of(vae)
    if (other.channels, other.factor) != (latents.channels, latents.factor):
        raise UserError(
            f"--vae is {vae}, with {other.channels} channels and {other.factor} pixels per latent; it must have "
            f"{latents.channels} and {latents.factor}, as {latents.vae}, which the model was trained with"
        )
    return replace(latents, vae=other.vae)
