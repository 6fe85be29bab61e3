"""What the trainer asks of a data set, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haste.data.bad_files import OnBadFile
from haste.errors import UserError
from haste.vae import LatentFormat


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

    resolution: pixels per side of the pictures. channels, input_size: of what the student sees.
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
        """Plain values by which the same data is known again; see `haste.data.fingerprint`."""
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
