"""Images and files: decoding and cropping, sets of images, PNG and the ADM `.npz`, the 8-bit conversion of samplers."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from haste.data.archive import Folder, open_archive, open_entry, read_header, read_npz
from haste.errors import BadFile, UserError, in_one_line
from haste.io import MOST_ELONGATED, MOST_PIXELS, read_bytes, write_atomically

# Pillow has more formats, some of which start a program (EPS: Ghostscript), and goes by content, not by name.
Image.init()
_KNOWN_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGE_FORMATS = tuple(kind for kind in _KNOWN_FORMATS if kind in Image.OPEN)  # not every Pillow has AVIF

_FORMAT_OF = Image.registered_extensions()


def silence_pillow() -> None:
    """Ignore Pillow's warnings, such as about EXIF; permanently, as a temporary filter affects all threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


silence_pillow()


def image_format(name: str) -> str | None:
    """Pillow's name of a file's format by its suffix, such as JPEG."""
    return _FORMAT_OF.get(os.path.splitext(name)[1].lower())


LOSSY = {"PNG": False, "BMP": False, "PPM": False, "GIF": False, "JPEG": True}  # other formats can be either


def webp_is_lossy(data: bytes) -> bool | None:
    """Whether the first image in the chunks of a WebP file is lossy (VP8) or lossless (VP8L); None if it has neither.

    https://developers.google.com/speed/webp/docs/riff_container: RIFF, the size, WEBP, then chunks of a name, a size of
    4 bytes and a content of even length; an ANMF chunk has 16 bytes of its own before chunks.
    """
    place = 12 if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else len(data)
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        place += 8 + (16 if name == b"ANMF" else size + size % 2)
    return None


def is_image(name: str) -> bool:
    """Whether a file's suffix is of a supported image format."""
    return image_format(name) in IMAGE_FORMATS


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to RGB. Raises BadFile if it is damaged, has no 8-bit channels, or exceeds the limits."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(*image.size, name)
            if image.mode.startswith(("I", "F")):  # convert() would clip these to white
                raise BadFile(name, f"must have 8 bits per channel, got pixels of type {image.mode}")
            return image.convert("RGB")
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        formats = ", ".join(IMAGE_FORMATS)
        raise BadFile(name, f"is no image of the formats {formats}" if data else "is empty") from error
    except Image.DecompressionBombError as error:
        raise BadFile(name, f"must have at most {MOST_PIXELS:,} pixels ({in_one_line(error)})") from error
    except Exception as error:  # decoders raise anything for a damaged file
        raise BadFile(name, f"is damaged ({in_one_line(error)})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise BadFile(name, f"must have at most {MOST_PIXELS:,} pixels, got {width} x {height}")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise BadFile(name, f"must be at most {MOST_ELONGATED} times as long as wide, got {width} x {height}")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Center crop to (3, size, size) uint8 as in ADM, REPA, SiT and DiT.

    Halve the image by box averages while its shorter side is at least twice `size`, resize it (bicubic) to a shorter
    side of `size`, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return to_pixels(image.crop((left, top, left + size, top + size)))


def square_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop the largest centered square and resize it (Lanczos) to (3, size, size) uint8, as U-ViT and REPA do for
    MS-COCO."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return to_pixels(image.resize((size, size), Image.Resampling.LANCZOS))


def to_pixels(image: Image.Image) -> np.ndarray:
    """Convert an RGB image to (3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_uint8(images: Tensor, rounded: bool = False) -> np.ndarray:
    """Convert images (N, 1 or 3, H, W) in [−1, 1] to (N, H, W, 3) uint8 like the public samplers.

    With `rounded`, clip(127.5·x + 128, 0, 255) in float32, as in SiT and DiT; otherwise clip(255·(x + 1)/2, 0, 255), as
    in HASTE and REPA. Both are then truncated.
    """
    x = images.detach().cpu().permute(0, 2, 3, 1)
    scaled = (127.5 * x.float() + 128.0 if rounded else 255.0 * ((x.double() + 1.0) / 2.0)).numpy()
    array = np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def image_path(folder: Path, index: int) -> Path:
    """The file of an image in a sample folder: six digits, as in the public samplers."""
    return folder / f"{index:06d}.png"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write one image (H, W, 3) uint8 as PNG, atomically."""
    write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def write_npz(
    path: Path,
    images: Iterable[np.ndarray],
    labels: np.ndarray | None,
    captions: Sequence[str | None] | None = None,
) -> None:
    """Write arr_0 (N, H, W, 3) uint8, as for the ADM evaluator, image by image, and labels (N,) or captions (N,) or
    both, atomically. A caption that is not known is empty; if none is, there are no captions."""
    columns = {} if labels is None else {"labels": np.asarray(labels)}
    if captions is not None and (any(captions) or not columns):
        columns["captions"] = np.array([caption or "" for caption in captions], dtype=np.str_)
    count = len(next(iter(columns.values())))

    def write(temporary: Path) -> None:
        remaining = iter(images)
        first = next(remaining)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for _, image in zip(range(count), itertools.chain([first], remaining), strict=True):
                    if image.shape != first.shape:
                        raise UserError(f"{path} must hold images of one size, got {first.shape} and {image.shape}")
                    entry.write(np.ascontiguousarray(image).data)
            for name, values in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, values)

    write_atomically(path, write)


def read_image(path: Path) -> np.ndarray:
    """Read one image, (H, W, 3) uint8. Raises UserError if that fails."""
    try:
        return np.asarray(decode_image(read_bytes(path), str(path)))
    except BadFile as fault:
        raise UserError(f"the image {fault}") from fault
    except OSError as error:
        raise UserError(f"the image {path} cannot be read: {error.strerror or in_one_line(error)}") from error


# ---- sets of images, read a batch at a time ----


class ImageSet(Protocol):
    """Images of one size in a fixed order.

    Attributes:
        shape: (height, width, 3).
        lossy: whether any was compressed with loss, as JPEG; None if that is not known.
    """

    shape: tuple[int, ...]
    lossy: bool | None

    def __len__(self) -> int: ...

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the images start, …, stop − 1 in batches (n, H, W, 3) uint8, with n = size except for the last."""

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """A hash of the images start, …, stop − 1."""


class ImageArray:
    """Images in memory, (N, H, W, 3) uint8; `lossy` as in ImageSet."""

    def __init__(self, images: np.ndarray, lossy: bool | None = None) -> None:
        self.images = images
        self.lossy = lossy
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        for first, last in _bounds(size, start, len(self) if stop is None else stop):
            yield self.images[first:last]

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images[start:stop]).tobytes()).hexdigest()


class ImageFiles:
    """The first `count` image files of a folder or a zip, at any depth, sorted by name."""

    def __init__(self, path: Path, flag: str, count: int | None = None) -> None:
        self.path = path
        self.archive = open_archive(path, flag)
        self.names = [name for name in self.archive.names() if is_image(name)][:count]
        if not self.names:
            raise UserError(f"{flag} must hold images ({', '.join(IMAGE_FORMATS)}), got {path}, which has none")
        self.shape = self._read(self.names[0]).shape
        self.lossy = self._are_lossy()

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
        """The numbers in the names of files of `haste sample`; None for other names."""
        stems = [Path(name).stem for name in self.names]
        return [int(stem) for stem in stems] if all(stem.isdecimal() for stem in stems) else None

    def _are_lossy(self) -> bool | None:
        """By the formats of all files; of WebP, which can be either, by the first file."""
        kinds = {image_format(name): name for name in reversed(self.names)}
        found = [LOSSY.get(kind or "") for kind in kinds]
        if "WEBP" in kinds:
            found.append(webp_is_lossy(self.archive.read(kinds["WEBP"])))
            found.remove(None)
        return True if True in found else None if None in found else False

    def _read(self, name: str) -> np.ndarray:
        try:
            return np.asarray(decode_image(self.archive.read(name), self.archive.locate(name)))
        except BadFile as fault:
            raise UserError(f"{fault}; replace it or remove it") from fault

    def _read_alike(self, name: str) -> np.ndarray:
        image = self._read(name)
        if image.shape != self.shape:
            sizes = " and ".join(f"{width} x {height}" for height, width, _ in (self.shape, image.shape))
            raise UserError(f"{self.path} must hold images of one size, got {sizes} ({name})")
        return image


class NpzImages:
    """The first `count` images of arr_0 (N, H, W, 3) uint8 of an .npz, read in batches, and its labels (N,) and
    captions (N,), text, if any."""

    lossy: bool | None = None  # the files that it was made of may have been anything

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, open_entry(archive, "arr_0") as file:
                header = read_header(file)
                truncated = header.size > archive.getinfo("arr_0.npy").file_size
            columns = read_npz(path, ["labels", "captions"])
        except Exception as error:  # zipfile and numpy raise anything for a damaged file
            raise UserError(f"{path} must be an .npz with images under arr_0: {in_one_line(error)}") from error
        shape = header.shape
        if len(shape) != 4 or shape[-1] != 3 or header.dtype != np.uint8 or header.fortran_order or 0 in shape:
            raise UserError(
                f"arr_0 in {path} must be uint8 (count, height, width, 3) in C order, got {header.dtype} {shape}"
            )
        if shape[1] * shape[2] > MOST_PIXELS:
            raise UserError(f"images in {path} must have at most {MOST_PIXELS:,} pixels, got {shape[1]} x {shape[2]}")
        if truncated:
            raise UserError(f"arr_0 in {path} must hold {shape[0]:,} images, as in its header, but is truncated")
        for name, values in columns.items():
            if values.shape != (shape[0],):
                raise UserError(f"{name} in {path} must be ({shape[0]},), one for each image, got {values.shape}")
        labels, captions = columns.get("labels"), columns.get("captions")
        if captions is not None and captions.dtype.kind != "U":
            raise UserError(f"captions in {path} must be text, got {captions.dtype}")
        self.count = shape[0] if count is None else min(count, shape[0])
        self.shape: tuple[int, ...] = shape[1:]
        self.labels = None if labels is None else labels[: self.count]
        self.captions: list[str] | None = None if captions is None else captions[: self.count].tolist()

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
                    raise UserError(f"arr_0 in {self.path} is truncated before image {last}")
                yield np.frombuffer(data, np.uint8).reshape(last - first, *self.shape)

    def _read(self, file: IO[bytes], size: int) -> bytes:
        try:
            return file.read(size)
        except Exception as error:  # as in __init__
            raise UserError(f"{self.path} cannot be read ({in_one_line(error)})") from error

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        return hashlib.sha256(repr((start, stop, _stamp(self.path))).encode()).hexdigest()


def open_images(path: Path, flag: str, count: int | None = None) -> ImageFiles | NpzImages:
    """Open the images of a folder, a .zip or an .npz, all or the first `count`. Raises UserError if there are none."""
    wanted = f"{flag} must be a folder, a .zip or an .npz of images"
    if not os.path.exists(path):
        raise UserError(f"{wanted}, got {path}, which does not exist")
    if path.suffix == ".npz" and os.path.isfile(path):
        return NpzImages(path, count)
    if path.suffix == ".npz" or not (os.path.isdir(path) or path.suffix == ".zip"):
        raise UserError(f"{wanted}, got {path}")
    return ImageFiles(path, flag, count)


def _bounds(size: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The first and last numbers of batches."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _stamp(path: Path) -> tuple[int, int]:
    """The size and the modification time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
