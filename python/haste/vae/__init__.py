"""The VAE between images and latents, and the shift and scale of the latents.

Reading order: latents (the format that data and checkpoints record), autoencoder (encoding and decoding), loading (what
--vae may name), kinds (one class of diffusers each), ldm (files of LDM's autoencoders, such as KL-16 and VA-VAE).
"""

from haste.vae.autoencoder import VAE
from haste.vae.latents import KL16_LATENTS, SD_LATENTS, LatentFormat, read_statistics, with_deviation
from haste.vae.ldm import load_ldm
from haste.vae.loading import PUBLISHED_VAES, resolve_vae

__all__ = [
    "KL16_LATENTS",
    "PUBLISHED_VAES",
    "SD_LATENTS",
    "VAE",
    "LatentFormat",
    "load_ldm",
    "read_statistics",
    "resolve_vae",
    "with_deviation",
]
