"""What the trainer asks of a data set, whatever it is made of.

By what a run knows its data again, wherever it lies: cheap, so that it can be looked at with every start.

    images   how many samples there are
    names    a checksum of the files' names in their folder or zip, in order; of a Hugging Face data set its fingerprint
    labels   a checksum of all labels
    files    checksums of a few files, spread over all: latents that were made anew keep their names and sizes

Images cropped as they are read: the student sees pixels, or latents that a VAE makes on the training device.

Images with latents that were made beforehand: what `haste prepare` writes, and REPA's own folders.

Images that fit into memory: they stay on the training device, and a sample is no more than its number.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import Archive, read_array
from haste.data.images import BadFile, OnBadFile, center_crop, decode_image, to_pixels
from haste.data.sources import ImageSource, pack_names
from haste.errors import UserError, in_one_line
from haste.vae import VAE, LatentFormat


class Batch(NamedTuple):
    """student: (B, C, S, S), float32, what is diffused: pixels in [-1, 1], or latents drawn anew, shifted and scaled.
    images: (B, 3 or 1, R, R), float32 in [-1, 1], what the teacher looks at; the same tensor as `student` for pixels.
        None after `without_images` where the student does not need them either.
    labels: (B,), int64.
    """

    student: Tensor
    images: Tensor | None
    labels: Tensor


class TrainingData(ABC):
    """A sample is read in a worker process and is the same each time; what is random happens in `to_batch`.

    resolution: pixels per side of the images. channels, input_size: of what the student sees.
    latents: how the student's latents come from their VAE; None for pixels.
    on_bad_file: what the loader does about a file that cannot be used. skipped: those it has passed over, and why.
    reads_files: whether samples are worth worker processes.
    """

    reads_files = True
    class_names: Sequence[str] | None = None  # by label, where the data has names

    def __init__(
        self,
        resolution: int,
        num_classes: int,
        latents: LatentFormat | None = None,
        channels: int = 3,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        self.resolution = resolution
        self.num_classes = num_classes
        self.latents = latents
        self.channels = channels if latents is None else latents.channels
        self.input_size = resolution if latents is None else latents.input_size(resolution)
        self.on_bad_file = on_bad_file
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """One sample, as stored. Raises BadFile."""

    @abstractmethod
    def collate(self, samples: list) -> Any:
        """The samples of a batch, as tensors on the CPU."""

    @abstractmethod
    def to_batch(self, raw: Any, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        """A collated batch on the training device, with all random draws from `generator`, or from torch's own."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain values by which the same data is known again; see `haste.data.dataset`."""
        return {"images": len(self)}

    def without_images(self) -> TrainingData:
        """The same data for when no teacher looks any more; where that saves reading, `Batch.images` is None."""
        return self


def count_classes(num_classes: int | None, found: int) -> int:
    """How many classes the student gets: as asked for, which must do for those found, or as many as were found."""
    if num_classes is not None and num_classes < found:
        raise UserError(f"--num-classes is {num_classes}; it must be at least {found}, as in the data")
    return found if num_classes is None else num_classes


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


LOOKED_AT = 16  # files


def fingerprint(count: int, names: bytes, labels: np.ndarray | None, read: Callable[[int], bytes]) -> dict[str, Any]:
    """names: what tells them all apart. labels: (count,) int64. read: the bytes of a sample's file."""
    chosen = sorted({index * (count - 1) // max(LOOKED_AT - 1, 1) for index in range(LOOKED_AT)})
    return {
        "images": count,
        "names": checksum(names),
        "labels": None if labels is None else checksum(labels.astype(np.int64).tobytes()),
        "files": [_checksum_of_file(read, index) for index in chosen],
    }


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checksum_of_file(read: Callable[[int], bytes], index: int) -> int | None:
    """None for a file that cannot be read, which --on-bad-file judges when its turn comes."""
    try:
        return zlib.crc32(read(index))
    except BadFile:
        return None


def describe_change(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In a few words, what is other now than in the fingerprint of the run's data when it began; nothing if it is the
    same, as far as that one tells. A file may have been restored: fewer than half of those looked at may be other ones.
    """
    if began.get("images", now["images"]) != now["images"]:
        return [f"{now['images']} images, which were {began['images']}"]
    changes = []
    if began.get("names", now.get("names")) != now.get("names"):
        changes.append("other names of files")
    if began.get("labels", now.get("labels")) != now.get("labels"):
        changes.append("other labels")
    before, after = began.get("files") or [], now.get("files") or []
    other = sum(a != b for a, b in zip(before, after, strict=False) if None not in (a, b))
    if not changes and 2 * other >= len(after) > 0:
        changes.append(f"other files ({other} of the {len(after)} that are looked at)")
    return changes


def other_latents(began: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two formats of latents, as plain values, give other numbers. The VAE itself may have moved."""
    names = ("channels", "factor", "shift", "scale")
    return not all(np.array_equal(began.get(name, now[name]), now[name]) for name in names)


class Images(NamedTuple):
    """pixels: uint8, (3, R, R) or a batch of them; label: int64, () or (B,)."""

    pixels: Tensor
    label: Tensor


class ImageData(TrainingData):
    """The images of a source at one resolution. vae: what turns them into latents; None for pixels."""

    def __init__(
        self,
        source: ImageSource,
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

    def __getitem__(self, index: int) -> Images:
        image = decode_image(self.source.read(index), self.source.name(index))
        label = 0 if self.source.labels is None else int(self.source.labels[index])
        return Images(torch.from_numpy(center_crop(image, self.resolution)), torch.tensor(label))

    def collate(self, samples: list[Images]) -> Images:
        return Images(*map(torch.stack, zip(*samples, strict=True)))

    def to_batch(self, raw: Images, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        images = to_unit(raw.pixels.to(device, non_blocking=True))
        labels = raw.label.to(device, non_blocking=True)
        if self._vae is None:
            return Batch(images, images, labels)
        moments = self._vae.to(device).encode(images)
        return Batch(self._vae.latents.draw(moments, generator), images, labels)


class Latents(NamedTuple):
    """pixels: uint8, (3, R, R), or empty where nobody looks; moments: float32, (2C, S, S); label: int64, ().
    Or batches of them."""

    pixels: Tensor
    moments: Tensor
    label: Tensor


class LatentData(TrainingData):
    """Images and their latents' moments, each sampled anew every time it is used."""

    def __init__(
        self,
        images: tuple[Archive, list[str]],
        moments: tuple[Archive, list[str]],
        labels: np.ndarray,
        resolution: int,
        num_classes: int,
        latents: LatentFormat,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, latents, on_bad_file=on_bad_file)
        self._images, image_names = images
        self._moments, moment_names = moments
        self._image_names, self._moment_names = pack_names(image_names), pack_names(moment_names)
        self._labels = labels
        self._with_images = True

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> dict[str, Any]:
        names = b"\n".join([*self._image_names.tolist(), *self._moment_names.tolist()])
        return fingerprint(len(self), names, self._labels, self._read_both)

    def _read_both(self, index: int) -> bytes:
        """The files of an image and of its moments, one after the other."""
        image, moments = os.fsdecode(self._image_names[index]), os.fsdecode(self._moment_names[index])
        return self._images.read(image) + self._moments.read(moments)

    def __getitem__(self, index: int) -> Latents:
        pixels = self._read_image(index) if self._with_images else np.empty(0, dtype=np.uint8)
        moments = self._read_moments(index)
        return Latents(torch.from_numpy(pixels), torch.from_numpy(moments), torch.tensor(self._labels[index]))

    def _read_image(self, index: int) -> np.ndarray:
        name = os.fsdecode(self._image_names[index])
        where, size = self._images.locate(name), self.resolution
        image = decode_image(self._images.read(name), where)
        if image.size != (size, size):
            found = f"{image.width} x {image.height}"
            raise BadFile(where, f"is {found} pixels, not {size} x {size} as --resolution says")
        return to_pixels(image)

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


class InMemoryData(TrainingData):
    """images: (M, C, R, R), float32 in [-1, 1]; labels: (M,), int64, 0 to num_classes - 1."""

    reads_files = False

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        super().__init__(images.shape[-1], num_classes, channels=images.shape[1])
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, samples: list[int]) -> Tensor:
        return torch.tensor(samples)

    def to_batch(self, raw: Tensor, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        self._images, self._labels = self._images.to(device), self._labels.to(device)
        indices = raw.to(device, non_blocking=True)
        images = self._images[indices]
        return Batch(images, images, self._labels[indices])
