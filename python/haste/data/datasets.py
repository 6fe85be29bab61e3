"""What the trainer needs to know about a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from haste.data.digits import load_digits
from haste.errors import UserError


@dataclass(frozen=True)
class ImageDataset:
    """Pictures that fit into memory.

    images: (M, C, S, S), float32 in [-1, 1]: what the student learns to draw and what the teacher looks at.
    labels: (M,), int64, 0 to num_classes - 1.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)


def _digits() -> ImageDataset:
    images, labels = load_digits()
    return ImageDataset(images, labels, num_classes=10)


DATASETS: dict[str, Callable[[], ImageDataset]] = {"digits": _digits}


def load_dataset(data_dir: str) -> ImageDataset:
    """The data set that --data-dir names; UserError, with the known ones, if there is none."""
    if data_dir not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"--data-dir is {data_dir!r}; it must be one of: {known} (--recipe digits sets it)")
    return DATASETS[data_dir]()
