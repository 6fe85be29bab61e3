"""Images and files: decoding and cropping, sets of images, PNG and the ADM `.npz`, the 8-bit conversion of samplers."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from haste.data.archive import Folder, open_archive, open_entry, read_header, read_npz
from haste.errors import BadFile, UserError, in_one_line
from haste.io import MOST_ELONGATED, MOST_PIXELS, read_bytes, remove_abandoned, write_atomically

# Pillow reads many more, some by starting a program (EPS: Ghostscript), and looks at content rather than at names.
Image.init()
_KNOWN_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGE_FORMATS = tuple(kind for kind in _KNOWN_FORMATS if kind in Image.OPEN)  # AVIF is not in every Pillow

_FORMAT_OF = Image.registered_extensions()


def silence_pillow() -> None:
    """Ignore its warnings, such as of odd EXIF entries: they do not change the pixels, or are errors below. For good: a
    filter that is set for a while would be set for other threads too."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


silence_pillow()


def image_format(name: str) -> str | None:
    """Pillow's name of the format that the ending of a file's name stands for, such as JPEG."""
    return _FORMAT_OF.get(os.path.splitext(name)[1].lower())


def is_image(name: str) -> bool:
    """Whether a file is called as an image of a format that is read."""
    return image_format(name) in IMAGE_FORMATS


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to RGB; BadFile if it is not all there, no 8-bit image, or larger than the limits."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(*image.size, name)
            if image.mode.startswith(("I", "F")):  # convert() would clip these to white
                raise BadFile(name, f"has pixels of type {image.mode}; they must have 8 bits a channel")
            return image.convert("RGB")
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        formats = ", ".join(IMAGE_FORMATS)
        raise BadFile(name, f"is no image, or of another format than {formats}" if data else "is empty") from error
    except Image.DecompressionBombError as error:  # its message has the number of pixels
        count = int(re.search(r"\d+", str(error)).group())
        raise BadFile(name, f"has {count:,} pixels; at most {MOST_PIXELS:,} are read") from error
    except Exception as error:  # a damaged file leads its decoder to raise anything
        raise BadFile(name, f"is no whole image ({in_one_line(error)})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise BadFile(name, f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are read")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        limit = f"the longer side must be at most {MOST_ELONGATED} times the shorter"
        raise BadFile(name, f"has {width} x {height} pixels; {limit}")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop the middle square of an image by ADM's rule, which REPA, SiT and DiT follow.

    It is halved by box averages while the shorter side is at least twice `size`, then resized (bicubic) until the
    shorter side is `size`, then cropped.

    Returns:
        (3, size, size) uint8.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return to_pixels(image.crop((left, top, left + size, top + size)))


def to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as (3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_uint8(images: Tensor, rounded: bool = False) -> np.ndarray:
    """Convert images to 8 bits as the public samplers do. One grey channel is repeated three times.

    Args:
        images: (N, C, H, W) in [−1, 1], C = 1 or 3.
        rounded: clip(127.5·x + 128, 0, 255) in float32, as SiT and DiT; otherwise clip(255·(x + 1)/2, 0, 255), as HASTE
            and REPA. Both are then truncated, which rounds the first.

    Returns:
        (N, H, W, 3) uint8.
    """
    x = images.detach().cpu().permute(0, 2, 3, 1)
    scaled = (127.5 * x.float() + 128.0 if rounded else 255.0 * ((x.double() + 1.0) / 2.0)).numpy()
    array = np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def image_path(folder: Path, index: int) -> Path:
    """The file of image number `index` of a sample folder: six digits, as the public samplers name them."""
    return folder / f"{index:06d}.png"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write one image (H, W, 3) uint8 as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def write_npz(path: Path, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write the ADM evaluator's file, arr_0 (N, H, W, 3) uint8, with the labels (N,) beside it, whole or not at all.

    Args:
        images: (H, W, 3) uint8 each, as many as labels. They are written as they come: 50,000 of 256 pixels are 10 GB.

    Raises:
        UserError: they differ in size.
    """

    def write(temporary: Path) -> None:
        remaining = iter(images)
        first = next(remaining)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape)}
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for _, image in zip(range(len(labels)), itertools.chain([first], remaining), strict=True):
                    if image.shape != first.shape:
                        sizes = f"{first.shape} and {image.shape}"
                        raise UserError(f"{path} cannot hold images of different sizes, {sizes}")
                    entry.write(np.ascontiguousarray(image).data)
            with archive.open("labels.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels))

    write_atomically(path, write)


def read_image(path: Path) -> np.ndarray:
    """Read one image, (H, W, 3) uint8; UserError if it cannot be read."""
    try:
        return np.asarray(decode_image(read_bytes(path), str(path)))
    except (OSError, BadFile) as error:
        raise UserError(f"the image {path} cannot be read: {in_one_line(error)}") from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write any arrays as an .npz, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    remove_abandoned(path)
    write_atomically(path, write)


# ---- sets of images, read a batch at a time ----


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
        if labels is not None and labels.shape != (shape[0],):
            raise UserError(f"labels in {path} must be ({shape[0]},), one for each image, got {labels.shape}")
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
