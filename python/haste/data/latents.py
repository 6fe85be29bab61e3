"""Stored latents: the moments of a VAE in .npy files, with the images they were made of for a teacher."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import read_array
from haste.data.dataset import Batch, TrainingData, fingerprint, to_unit
from haste.data.images import decode_image, to_pixels
from haste.data.sources import FileSource
from haste.errors import BadFile, OnBadFile, in_one_line
from haste.vae import LatentFormat


class Latents(NamedTuple):
    """pixels: uint8, (3, R, R), or empty without a teacher; moments: float32, (2C, S, S), or latents, (C, S, S); label:
    int64, ()."""

    pixels: Tensor
    moments: Tensor
    label: Tensor


class LatentData(TrainingData):
    """Images with the moments of their latents, which are sampled at each use; or with latents, which are not.

    Args:
        moments, mirrored: one file for each of `images`, in the same order: of the image, and of its mirror image; None
            without mirror images.
    """

    def __init__(
        self,
        images: FileSource,
        moments: FileSource,
        mirrored: FileSource | None,
        labels: np.ndarray,
        resolution: int,
        num_classes: int,
        latents: LatentFormat,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, latents, on_bad_file=on_bad_file)
        self._format = latents
        self._images, self._moments, self._mirrored, self._labels = images, moments, mirrored, labels
        self._with_images = True
        self._flips = False
        self._stored = stored_channels(moments, latents.channels)

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> dict[str, Any]:
        files = [self._images, self._moments]
        if self._flips and self._mirrored is not None:
            files.append(self._mirrored)
        names = b"\n".join(each.listing() for each in files)
        return fingerprint(len(self), names, self._labels, lambda index: b"".join(each.read(index) for each in files))

    def __getitem__(self, index: int) -> Latents:
        pixels = self._read_image(index) if self._with_images else np.empty(0, dtype=np.uint8)
        moments = self._read_moments(self._moments, index)
        return Latents(torch.from_numpy(pixels), torch.from_numpy(moments), torch.tensor(self._labels[index]))

    def _read_image(self, index: int) -> np.ndarray:
        where, size = self._images.name(index), self.resolution
        image = decode_image(self._images.read(index), where)
        if image.size != (size, size):
            found = f"{image.width} x {image.height}"
            raise BadFile(where, f"must have {size} x {size} pixels, as --resolution, got {found}")
        return to_pixels(image)

    def read(self, index: int, chance: int) -> Latents:
        """Of an image, or with random flips by `chance` of its mirror image. Raises BadFile."""
        if not self._flips or self._mirrored is None or not chance % 2:
            return self[index]
        moments = torch.from_numpy(self._read_moments(self._mirrored, index))
        pixels = torch.from_numpy(self._read_image(index)).flip(-1) if self._with_images else torch.empty(0).byte()
        return Latents(pixels, moments, torch.tensor(self._labels[index]))

    def with_random_flip(self) -> TrainingData:
        if self._mirrored is None:
            return super().with_random_flip()
        data = self._copy()
        data._flips = True
        return data

    def _read_moments(self, source: FileSource, index: int) -> np.ndarray:
        where, shape = source.name(index), (self._stored, self.input_size, self.input_size)
        moments = decode_moments(source.read(index), where)
        if moments.shape != shape:
            wanted, found = (" x ".join(map(str, sizes)) for sizes in (shape, moments.shape))
            raise BadFile(where, f"must hold {wanted} numbers for --resolution {self.resolution}, got {found}")
        return moments

    def to_batch(self, raw: Latents, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        inputs = sample_stored(self._format, raw.moments.to(device, non_blocking=True), generator)
        images = to_unit(raw.pixels.to(device, non_blocking=True)) if self._with_images else None
        return Batch(inputs, images, raw.label.to(device, non_blocking=True))

    def without_images(self) -> LatentData:
        data = self._copy()
        data._with_images = False
        return data


def stored_channels(moments: FileSource, channels: int) -> int:
    """The channels of the files: `channels` if the first one holds latents, else twice as many, for moments."""
    try:
        first = decode_moments(moments.read(0), moments.name(0))
    except BadFile:  # which is reported when it is used
        return 2 * channels
    return channels if len(first) == channels else 2 * channels


def sample_stored(latents: LatentFormat, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Model inputs (B, C, S, S) of moments (B, 2C, S, S), which are sampled, or of latents (B, C, S, S)."""
    if stored.shape[1] == latents.channels:
        stored = torch.cat([stored, torch.zeros_like(stored)], dim=1)  # without a deviation
    return latents.sample_posterior(stored, generator)


def decode_moments(data: bytes, name: str) -> np.ndarray:
    """Read an .npy file as `as_moments`. Raises BadFile if it is damaged or not finite."""
    try:
        moments = read_array(io.BytesIO(data), len(data))
    except Exception as error:  # numpy raises anything for a damaged file
        raise BadFile(name, f"is no valid .npy file ({in_one_line(error)})") from error
    return as_moments(moments, name)


def as_moments(array: np.ndarray, name: str) -> np.ndarray:
    """An array as float32, without a leading dimension of 1. Raises BadFile if it does not hold finite numbers."""
    if array.dtype.kind not in "biuf":
        raise BadFile(name, f"must hold numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        single = np.asarray(array, dtype=np.float32)
    if not np.isfinite(single).all():
        raise BadFile(name, "must hold finite numbers within float32, got others")
    return single[0] if single.ndim == 4 and len(single) == 1 else single
