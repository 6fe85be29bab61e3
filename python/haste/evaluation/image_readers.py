"""Sets of images to be evaluated, read a batch at a time: a folder or a zip of files, an .npz, or images in memory."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from haste.data.archive import Folder, open_archive, open_entry, read_header, read_npz
from haste.data.images import IMAGE_FORMATS, decode_image, image_format, is_image
from haste.errors import BadFile, UserError, in_one_line
from haste.io import MOST_PIXELS


class ImageSet(Protocol):
    """Images of one size, uint8, in a fixed order. shape: (height, width, 3). are_jpeg: whether any was a JPEG."""

    shape: tuple[int, ...]
    are_jpeg: bool

    def __len__(self) -> int: ...

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images start, …, stop − 1 in batches (n, H, W, 3) uint8, n = size but for the last."""

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Hex digits that change when one of these images does."""


class ImageArray:
    """Images in memory, (N, H, W, 3) uint8."""

    are_jpeg = False

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        for first, last in _bounds(size, start, len(self) if stop is None else stop):
            yield self.images[first:last]

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images[start:stop]).tobytes()).hexdigest()


class ImageFiles:
    """The image files of a folder or a zip, at any depth, in the order of their names; the first `count` of them."""

    def __init__(self, path: Path, flag: str, count: int | None = None) -> None:
        self.path = path
        self.archive = open_archive(path, flag)
        self.names = [name for name in self.archive.names() if is_image(name)][:count]
        if not self.names:
            raise UserError(f"{flag} is {path}, which holds no images ({', '.join(IMAGE_FORMATS)})")
        self.shape = self._read(self.names[0]).shape
        self.are_jpeg = any(image_format(name) == "JPEG" for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            for first, last in _bounds(size, start, len(self) if stop is None else stop):
                yield np.stack(list(pool.map(self._read_alike, self.names[first:last])))

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        in_folder = isinstance(self.archive, Folder)
        stamps = [(name, _stamp(self.path / name if in_folder else self.path)) for name in self.names[start:stop]]
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    def numbers(self) -> list[int] | None:
        """The numbers that the files are named by, as `haste sample` names them; None if they have other names."""
        stems = [Path(name).stem for name in self.names]
        return [int(stem) for stem in stems] if all(stem.isdecimal() for stem in stems) else None

    def _read(self, name: str) -> np.ndarray:
        try:
            return np.asarray(decode_image(self.archive.read(name), self.archive.locate(name)))
        except BadFile as fault:
            raise UserError(f"{fault}; replace it or take it out") from fault

    def _read_alike(self, name: str) -> np.ndarray:
        image = self._read(name)
        if image.shape != self.shape:
            (height, width, _), (own_height, own_width, _) = self.shape, image.shape
            raise UserError(
                f"{self.path} holds images of different sizes, {width} x {height} and {own_width} x {own_height} "
                f"({name}); they must all be alike"
            )
        return image


class NpzImages:
    """arr_0 of an .npz as the ADM evaluator reads it, (N, H, W, 3) uint8, read from the file as it is needed.

    labels: (N,), where the file has them. count: only the first so many.
    """

    are_jpeg = False

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, open_entry(archive, "arr_0") as file:
                header = read_header(file)
                cut_short = header.size > archive.getinfo("arr_0.npy").file_size
            labels = read_npz(path, ["labels"]).get("labels")
        except Exception as error:  # a damaged file leads its decoder to raise anything
            raise UserError(f"{path} is not an .npz with images under arr_0 ({in_one_line(error)})") from error
        shape = header.shape
        if len(shape) != 4 or shape[-1] != 3 or header.dtype != np.uint8 or header.fortran_order or 0 in shape:
            raise UserError(
                f"arr_0 in {path} is {header.dtype} {shape}; it must be uint8 (count, height, width, 3), row by row"
            )
        if shape[1] * shape[2] > MOST_PIXELS:
            raise UserError(f"arr_0 in {path} is {shape}; images must have at most {MOST_PIXELS:,} pixels")
        if cut_short:
            raise UserError(f"{path} is cut short: arr_0 has less than the {shape[0]:,} images of its header")
        if labels is not None and labels.ndim != 1:
            raise UserError(f"labels in {path} have shape {labels.shape}; they must be (count,)")
        self.count = shape[0] if count is None else min(count, shape[0])
        self.shape: tuple[int, ...] = shape[1:]
        self.labels = None if labels is None else labels[: self.count]

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        image = math.prod(self.shape)
        with zipfile.ZipFile(self.path) as archive, open_entry(archive, "arr_0") as file:
            read_header(file)
            file.seek(start * image, os.SEEK_CUR)
            for first, last in _bounds(size, start, len(self) if stop is None else stop):
                data = self._read(file, (last - first) * image)
                if len(data) < (last - first) * image:
                    raise UserError(f"{self.path} is cut short: arr_0 ends before image {last}")
                yield np.frombuffer(data, np.uint8).reshape(last - first, *self.shape)

    def _read(self, file: IO[bytes], size: int) -> bytes:
        try:
            return file.read(size)
        except Exception as error:  # as above
            raise UserError(f"{self.path} cannot be read ({in_one_line(error)})") from error

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        return hashlib.sha256(repr((start, stop, _stamp(self.path))).encode()).hexdigest()


def open_images(path: Path, flag: str, count: int | None = None) -> ImageFiles | NpzImages:
    """The images at `path`, which `flag` gave: all, or the first `count`. UserError if there are none."""
    if not os.path.exists(path):
        raise UserError(f"{flag} is {path}, which does not exist")
    if not os.path.isdir(path) and path.suffix not in (".npz", ".zip"):
        raise UserError(f"{flag} is {path}; images must be in a folder, a .zip or an .npz")
    if path.suffix == ".npz" and not os.path.isfile(path):
        raise UserError(f"{flag} is {path}, which is no regular file")
    return NpzImages(path, count) if path.suffix == ".npz" else ImageFiles(path, flag, count)


def _bounds(size: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where each batch begins and ends."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of writing: what changes with a file's content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
