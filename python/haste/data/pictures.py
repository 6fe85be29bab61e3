"""From the bytes of a picture file to pixels of one size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from haste.data.bad_files import BadFile
from haste.errors import in_one_line

Image.init()
PICTURE_ENDINGS = frozenset(Image.registered_extensions())


def is_picture(name: str) -> bool:
    """Whether the ending of a file's name is that of a picture format."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in PICTURE_ENDINGS


def decode_picture(data: bytes, name: str) -> Image.Image:
    """The picture in RGB, whole; BadFile if it is not all there or no 8-bit picture."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode.startswith(("I", "F")):  # convert() would clip these to white
                raise BadFile(name, f"has pixels of type {picture.mode}; they must have 8 bits a channel")
            return picture.convert("RGB")
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        raise BadFile(name, "is no picture" if data else "is empty") from error
    except Exception as error:  # a damaged file leads its decoder to raise anything
        raise BadFile(name, f"is no whole picture ({in_one_line(error)})") from error


def center_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The middle square of a picture as (3, size, size) uint8, by ADM's rule, which REPA, SiT and DiT follow.

    Halved by box averages while the shorter side is at least twice `size`, then resized (bicubic) until the shorter
    side is `size`, then cropped.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return to_pixels(picture.crop((left, top, left + size, top + size)))


def to_pixels(picture: Image.Image) -> np.ndarray:
    """(3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
