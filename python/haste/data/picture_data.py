"""Pictures cropped as they are read: the student sees pixels, or latents that a VAE makes on the training device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste.data.bad_files import OnBadFile
from haste.data.fingerprint import fingerprint
from haste.data.pictures import center_crop, decode_picture
from haste.data.sources import PictureSource
from haste.data.training_data import Batch, TrainingData, to_unit
from haste.vae import VAE


class Pictures(NamedTuple):
    """pixels: uint8, (3, R, R) or a batch of them; label: int64, () or (B,)."""

    pixels: Tensor
    label: Tensor


class PictureData(TrainingData):
    """The pictures of a source at one resolution. vae: what turns them into latents; None for pixels."""

    def __init__(
        self,
        source: PictureSource,
        resolution: int,
        num_classes: int,
        vae: VAE | None = None,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, vae.latents if vae is not None else None, on_bad_file=on_bad_file)
        self.source = source
        self.class_names = source.class_names
        self._vae = vae

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}  # worker processes read, they do not encode

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(len(self), self.source.listing(), self.source.labels, self.source.read)

    def __getitem__(self, index: int) -> Pictures:
        picture = decode_picture(self.source.read(index), self.source.name(index))
        label = 0 if self.source.labels is None else int(self.source.labels[index])
        return Pictures(torch.from_numpy(center_crop(picture, self.resolution)), torch.tensor(label))

    def collate(self, samples: list[Pictures]) -> Pictures:
        return Pictures(*map(torch.stack, zip(*samples, strict=True)))

    def to_batch(self, raw: Pictures, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        images = to_unit(raw.pixels.to(device, non_blocking=True))
        labels = raw.label.to(device, non_blocking=True)
        if self._vae is None:
            return Batch(images, images, labels)
        moments = self._vae.to(device).encode(images)
        return Batch(self._vae.latents.draw(moments, generator), images, labels)
