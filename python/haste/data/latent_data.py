"""Pictures with latents that were made beforehand: what `haste prepare` writes, and REPA's own folders."""

from __future__ import annotations

import copy
import io
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import Archive
from haste.data.arrays import read_array
from haste.data.bad_files import BadFile, OnBadFile
from haste.data.fingerprint import fingerprint
from haste.data.pictures import decode_picture, to_pixels
from haste.data.sources import pack_names
from haste.data.training_data import Batch, TrainingData, to_unit
from haste.errors import in_one_line
from haste.vae import LatentFormat


class Latents(NamedTuple):
    """pixels: uint8, (3, R, R), or empty where nobody looks; moments: float32, (2C, S, S); label: int64, ().
    Or batches of them."""

    pixels: Tensor
    moments: Tensor
    label: Tensor


class LatentData(TrainingData):
    """Pictures and their latents' moments, each sampled anew every time it is used."""

    def __init__(
        self,
        pictures: tuple[Archive, list[str]],
        moments: tuple[Archive, list[str]],
        labels: np.ndarray,
        resolution: int,
        num_classes: int,
        latents: LatentFormat,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, latents, on_bad_file=on_bad_file)
        self._pictures, picture_names = pictures
        self._moments, moment_names = moments
        self._picture_names, self._moment_names = pack_names(picture_names), pack_names(moment_names)
        self._labels = labels
        self._with_images = True

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> dict[str, Any]:
        names = b"\n".join([*self._picture_names.tolist(), *self._moment_names.tolist()])
        return fingerprint(len(self), names, self._labels, self._read_both)

    def _read_both(self, index: int) -> bytes:
        """The files of a picture and of its moments, one after the other."""
        picture, moments = os.fsdecode(self._picture_names[index]), os.fsdecode(self._moment_names[index])
        return self._pictures.read(picture) + self._moments.read(moments)

    def __getitem__(self, index: int) -> Latents:
        pixels = self._read_picture(index) if self._with_images else np.empty(0, dtype=np.uint8)
        moments = self._read_moments(index)
        return Latents(torch.from_numpy(pixels), torch.from_numpy(moments), torch.tensor(self._labels[index]))

    def _read_picture(self, index: int) -> np.ndarray:
        name = os.fsdecode(self._picture_names[index])
        where, size = self._pictures.locate(name), self.resolution
        picture = decode_picture(self._pictures.read(name), where)
        if picture.size != (size, size):
            found = f"{picture.width} x {picture.height}"
            raise BadFile(where, f"is {found} pixels, not {size} x {size} as --resolution says")
        return to_pixels(picture)

    def _read_moments(self, index: int) -> np.ndarray:
        name = os.fsdecode(self._moment_names[index])
        where, shape = self._moments.locate(name), (2 * self.channels, self.input_size, self.input_size)
        moments = decode_moments(self._moments.read(name), where)
        if moments.shape != shape:
            wanted = f"not {_times(shape)} as --resolution {self.resolution} and the VAE say"
            raise BadFile(where, f"holds {_times(moments.shape)} numbers, {wanted}")
        return moments

    def collate(self, samples: list[Latents]) -> Latents:
        return Latents(*map(torch.stack, zip(*samples, strict=True)))

    def to_batch(self, raw: Latents, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        student = self.latents.draw(raw.moments.to(device, non_blocking=True), generator)
        images = to_unit(raw.pixels.to(device, non_blocking=True)) if self._with_images else None
        return Batch(student, images, raw.label.to(device, non_blocking=True))

    def without_images(self) -> LatentData:
        data = copy.copy(self)
        data._with_images = False
        return data


def decode_moments(data: bytes, name: str) -> np.ndarray:
    """The array of an .npy file as float32, without a leading 1; BadFile if it is cut short or not finite."""
    try:
        moments = read_array(io.BytesIO(data), len(data))
        if moments.dtype.kind not in "biuf":
            raise ValueError(f"it holds {moments.dtype}, not numbers")
        with np.errstate(over="ignore"):  # numpy's own warning; the sentence is below
            single = np.asarray(moments, dtype=np.float32)
    except Exception as error:  # a damaged file leads numpy to raise anything
        raise BadFile(name, f"is no whole .npy file ({in_one_line(error)})") from error
    if not np.isfinite(single).all():
        reason = "beyond float32" if np.isfinite(moments).all() else "that are not finite"
        raise BadFile(name, f"holds numbers {reason}")
    return single[0] if single.ndim == 4 and len(single) == 1 else single


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
