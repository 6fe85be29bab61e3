"""CIFAR-10 (Krizhevsky, 2009) as image files, train/CLASS/NAME and test/CLASS/NAME, in memory; and views of it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from haste.data.images import decode_image
from haste.data.sources import open_source
from haste.errors import UserError
from torch import Tensor

SIDE, CLASSES = 32, 10


def find_data(path: Path, scratch: Path) -> Path:
    """The folder with train/ and test/; a tar file is unpacked into `scratch` once.

    Raises:
        UserError: it holds no such folders.
    """
    if path.is_file():
        unpacked = scratch / "cifar10"
        if not (unpacked / "done").is_file():
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
            (unpacked / "done").touch()
        path = unpacked
    if not all((path / part).is_dir() for part in ("train", "test")):
        raise UserError(
            f"--data-dir must be a folder with train/CLASS/ and test/CLASS/, or a tar file of it, got {path}"
        )
    return path


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 32, 32) uint8 of a folder, and their classes (N,) int64."""
    source = open_source(folder, "--data-dir")
    images = [np.asarray(decode_image(source.read(number), source.name(number))) for number in range(len(source))]
    if source.labels is None or source.num_classes != CLASSES or {image.shape for image in images} != {(SIDE, SIDE, 3)}:
        raise UserError(f"--data-dir must hold {CLASSES} classes of images of {SIDE} x {SIDE} pixels, got {folder}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(source.labels)


def augment(images: Tensor) -> Tensor:
    """A view of each image (B, 3, 32, 32): shifted by up to 4 pixels, mirrored or not, brighter or darker."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, count))
    rows, columns = top[:, None] + torch.arange(SIDE), left[:, None] + torch.arange(SIDE)
    mirrored = torch.rand(count) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    views = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast, brightness = 0.8 + 0.4 * torch.rand(2, count, 1, 1, 1)
    return (views * contrast + brightness - 1).contiguous()
