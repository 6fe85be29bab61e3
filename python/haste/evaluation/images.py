"""Pictures as bytes and files: the 8-bit conversion of the public samplers, PNG folders and the ADM `.npz`."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.io import read_bytes, remove_abandoned, write_atomically


def to_uint8(images: Tensor, rounded: bool = False) -> np.ndarray:
    """Pictures (N, C, H, W) in [−1, 1], C = 1 or 3, to (N, H, W, 3) uint8: clip(255·x, 0, 255) truncated, x in [0, 1].

    Truncated, not rounded, as HASTE's and REPA's samplers do. One grey channel is repeated three times.
    rounded: clip(127.5·x + 128, 0, 255) truncated, x in [−1, 1] and float32, which rounds: SiT and DiT.
    """
    x = images.detach().cpu().permute(0, 2, 3, 1)
    scaled = (127.5 * x.float() + 128.0 if rounded else 255.0 * ((x.double() + 1.0) / 2.0)).numpy()
    array = np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def picture_path(folder: Path, index: int) -> Path:
    """Where picture number `index` of a sample folder lies: six digits, as the public samplers name them."""
    return folder / f"{index:06d}.png"


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write one picture (H, W, 3) uint8 as PNG, so that a kill leaves the whole file or none."""
    from PIL import Image  # what samples without writing pictures does without it

    write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def write_npz(path: Path, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write the ADM evaluator's file, arr_0 (N, H, W, 3) uint8, with the labels (N,) beside it, whole or not at all.

    images: (H, W, 3) uint8 each, as many as labels. They are written as they come, so that 50,000 of 256 pixels, which
    are 10 GB, need never be in memory together. Raises UserError if they differ in size.
    """

    def write(temporary: Path) -> None:
        pictures = iter(images)
        first = next(pictures)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape)}
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for _, picture in zip(range(len(labels)), itertools.chain([first], pictures), strict=True):
                    if picture.shape != first.shape:
                        sizes = f"{first.shape} and {picture.shape}"
                        raise UserError(f"{path} cannot hold pictures of different sizes, {sizes}")
                    entry.write(np.ascontiguousarray(picture).data)
            with archive.open("labels.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels))

    write_atomically(path, write)


def read_picture(path: Path) -> np.ndarray:
    """One picture, (H, W, 3) uint8. Raises UserError if there is none."""
    from haste.data.bad_files import BadFile  # what samples without reading pictures does without Pillow
    from haste.data.pictures import decode_picture

    try:
        return np.asarray(decode_picture(read_bytes(path), str(path)))
    except (OSError, BadFile) as error:
        raise UserError(f"the picture {path} cannot be read: {in_one_line(error)}") from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write any arrays as an .npz, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **arrays)

    remove_abandoned(path)
    write_atomically(path, write)
