"""Training data: images that are cropped when they are read, and images in memory; latents.py has stored latents.

A resumed run recognizes its data, wherever it is, by a fingerprint that is cheap to compute:

    images   the number of samples
    names    a checksum of the names of all files, in order; the fingerprint of a Hugging Face data set
    labels   a checksum of all labels
    files    checksums of a few files: recomputed latents keep their names and sizes
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from haste.data.images import center_crop, decode_image
from haste.data.sources import FileSource, ImageSource
from haste.errors import BadFile, OnBadFile, UserError
from haste.vae import VAE, LatentFormat

if TYPE_CHECKING:
    from haste.text import TextFormat

Data = TypeVar("Data", bound="TrainingData")


class Batch(NamedTuple):
    """One batch on the training device.

    Attributes:
        inputs: (B, C, S, S), float32: pixels in [-1, 1], or latents sampled from their posterior, shifted and scaled.
        images: (B, 3 or 1, R, R), float32 in [-1, 1], for the teacher; for pixels the same tensor as `inputs`. None for
            latents without images, or after `without_images`.
        condition: classes (B,), int64; or the features of captions, (B, tokens, width), float32.
    """

    inputs: Tensor
    images: Tensor | None
    condition: Tensor


class TrainingData(ABC):
    """Samples by number. Reading one, in a worker process, is deterministic; random numbers are used in `to_batch`.

    Attributes:
        resolution: pixels per side of the images.
        image_channels: of the images that a teacher is given.
        channels, input_size: of the model's inputs.
        latents: the format of the latents; None for pixels.
        on_bad_file: "refuse" files that cannot be used, or "skip" them.
        skipped: from the names of skipped files to the reasons.
        reads_files: whether worker processes are of use.
        unmirrored: for messages, the kind of the data and why its images are not mirrored, where they are not.
        class_names: by label, where the data has names.
        text: the format of the features of captions; None for classes.
        null: those of no caption, (tokens, width), for data with captions that has them.
    """

    reads_files = True
    unmirrored = "this data"
    class_names: Sequence[str] | None = None
    text: TextFormat | None = None
    null: Tensor | None = None

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
        self.image_channels = channels
        self.channels = channels if latents is None else latents.channels
        self.input_size = resolution if latents is None else latents.input_size(resolution)
        self.on_bad_file = on_bad_file
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Read one sample. Raises BadFile."""

    def read(self, index: int, chance: int) -> Any:
        """As data[index], where a sample is one of several, such as an image with one of its captions: the one that
        `chance`, below 2⁶⁴, chooses."""
        return self[index]

    def _copy(self: Data) -> Data:
        """The same data, to be changed; copy.copy would leave out what worker processes do not get, the VAE."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def with_random_flip(self) -> TrainingData:
        """The same data, of which `read` mirrors an image or not, by its `chance`.

        Raises:
            UserError: what is trained on cannot be mirrored.
        """
        raise UserError(f"--random-flip must be left out for {self.unmirrored}")

    def examples(self, count: int) -> tuple[Tensor, list[str]]:
        """Conditions (count, ...) for samples to look at, and their titles: classes that are spread over all."""
        labels = torch.arange(count) * max(self.num_classes, count) // count % self.num_classes
        names = dict(enumerate(self.class_names or ()))
        return labels, [names.get(label, str(label)) for label in labels.tolist()]

    def captions(self, count: int) -> list[str] | None:
        """At most `count` captions, spread over the data; None for data without."""
        return None

    def collate(self, samples: list) -> Any:
        """Stack samples to a batch, on the CPU."""
        return type(samples[0])(*map(torch.stack, zip(*samples, strict=True)))

    @abstractmethod
    def to_batch(self, raw: Any, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        """Move a collated batch to the training device; random numbers are from `generator`, or torch's global one."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that identify the data; see the module."""
        return {"images": len(self)}

    def require_images(self) -> None:
        """Raise UserError if a teacher gets no images from this data; see --image-dir."""
        return

    def without_images(self) -> TrainingData:
        """The same data for a run without a teacher, possibly with `Batch.images` None."""
        return self


def require_image_dir(
    images: FileSource | None, where: str, read: Callable[[FileSource, int], object], on_bad_file: OnBadFile
) -> None:
    """Raise UserError if latents have no images beside them, for a teacher, or with "refuse" if the first is damaged.

    Args:
        where: the latents are, such as "below FOLDER". read: as the data reads an image, by its number.
    """
    if images is None:
        raise UserError(f"--image-dir must be the images that the latents {where} were made of, for the teacher of "
                        "--enc-type, got none")  # fmt: skip
    try:
        read(images, 0)
    except BadFile as fault:
        if on_bad_file == "refuse":
            raise fault.as_user_error() from fault


def count_classes(num_classes: int | None, found: int) -> int:
    """--num-classes, or the number of classes of the data."""
    if num_classes is not None and num_classes < found:
        raise UserError(f"--num-classes must be at least {found}, as in the data, got {num_classes}")
    return found if num_classes is None else num_classes


def to_unit(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


COMPARED = 16  # files


def fingerprint(count: int, names: bytes, labels: np.ndarray | None, read: Callable[[int], bytes]) -> dict[str, Any]:
    """The fingerprint of `count` samples; see the module. `read` returns the bytes of a sample's file."""
    chosen = sorted({index * (count - 1) // max(COMPARED - 1, 1) for index in range(COMPARED)})
    return {
        "images": count,
        "names": checksum(names),
        "labels": None if labels is None else checksum(labels.astype(np.int64).tobytes()),
        "files": [_checksum_of_file(read, index) for index in chosen],
    }


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checksum_of_file(read: Callable[[int], bytes], index: int) -> int | None:
    """None for a file that cannot be read, which is handled by --on-bad-file when it is used."""
    try:
        return zlib.crc32(read(index))
    except BadFile:
        return None


def describe_change(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two fingerprints, as far as known; fewer than half of the compared files may differ."""
    if began.get("images", now["images"]) != now["images"]:
        return [f"{now['images']} images, which were {began['images']}"]
    names = {"names": "other names of files", "labels": "other labels"}
    changes = [what for key, what in names.items() if began.get(key, now.get(key)) != now.get(key)]
    before, after = began.get("files") or [], now.get("files") or []
    other = sum(a != b for a, b in zip(before, after, strict=False) if None not in (a, b))
    if not changes and 2 * other >= len(after) > 0:
        changes.append(f"other files ({other} of the {len(after)} that are compared)")
    return changes


def other_latents(began: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two formats of latents, as plain values, differ in their numbers; the VAE may have another path."""
    names = ("channels", "factor", "shift", "scale")
    return not all(np.array_equal(began.get(name, now[name]), now[name]) for name in names)


class Images(NamedTuple):
    """pixels: uint8, (3, R, R); label: int64, (); or batches of these."""

    pixels: Tensor
    label: Tensor


class ImageData(TrainingData):
    """The images of a source at one resolution; `vae` encodes them on the training device, None is for pixels."""

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
        self._flips = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}  # not needed in worker processes

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(len(self), self.source.listing(), self.source.labels, self.source.read)

    def __getitem__(self, index: int) -> Images:
        image = decode_image(self.source.read(index), self.source.name(index))
        label = 0 if self.source.labels is None else int(self.source.labels[index])
        return Images(torch.from_numpy(center_crop(image, self.resolution)), torch.tensor(label))

    def read(self, index: int, chance: int) -> Images:
        """An image, or with random flips by `chance` its mirror image. Raises BadFile."""
        sample = self[index]
        return sample._replace(pixels=sample.pixels.flip(-1)) if self._flips and chance % 2 else sample

    def with_random_flip(self) -> ImageData:
        data = self._copy()
        data._flips = True
        return data

    def to_batch(self, raw: Images, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        images = to_unit(raw.pixels.to(device, non_blocking=True))
        labels = raw.label.to(device, non_blocking=True)
        if self._vae is None:
            return Batch(images, images, labels)
        moments = self._vae.to(device).encode(images)
        return Batch(self._vae.latents.sample_posterior(moments, generator), images, labels)


class InMemoryData(TrainingData):
    """Images on the training device; a sample is the number of an image, or that plus their count for its mirror image.

    Args:
        images: (M, C, R, R), float32 in [-1, 1].
        labels: (M,), int64, 0 to num_classes - 1.
    """

    reads_files = False

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        super().__init__(images.shape[-1], num_classes, channels=images.shape[1])
        self._images = images
        self._labels = labels
        self._flips = False

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> int:
        return index

    def read(self, index: int, chance: int) -> int:
        """The number of an image, or with random flips by `chance` that of its mirror image."""
        return index + len(self) if self._flips and chance % 2 else index

    def with_random_flip(self) -> InMemoryData:
        data = self._copy()
        data._flips = True
        return data

    def collate(self, samples: list[int]) -> Tensor:
        return torch.tensor(samples)

    def to_batch(self, raw: Tensor, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        self._images, self._labels = self._images.to(device), self._labels.to(device)
        numbers = raw.to(device, non_blocking=True)
        indices, mirrored = numbers % len(self), numbers >= len(self)
        images = self._images[indices]
        if self._flips:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return Batch(images, images, self._labels[indices])
