"""From the bytes of a picture file to pixels of one size."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from haste.data.bad_files import BadFile
from haste.errors import in_one_line
from haste.limits import MOST_ELONGATED, MOST_PIXELS

# Pillow reads many more, some by starting a program (EPS: Ghostscript), and looks at content rather than at names.
Image.init()
_KNOWN_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
IMAGE_FORMATS = tuple(kind for kind in _KNOWN_FORMATS if kind in Image.OPEN)  # AVIF is not in every Pillow

_FORMAT_OF = Image.registered_extensions()
PICTURE_ENDINGS = frozenset(ending for ending, kind in _FORMAT_OF.items() if kind in IMAGE_FORMATS)
OTHER_ENDINGS = frozenset(_FORMAT_OF) - PICTURE_ENDINGS


def silence_pillow() -> None:
    """What it warns of, such as odd EXIF entries, is either of no consequence for the pixels or refused below. For
    good: a filter that is set for a while would be set for other threads too."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


silence_pillow()


def is_picture(name: str) -> bool:
    """Whether the ending of a file's name is that of an image format that is read."""
    return _ending(name) in PICTURE_ENDINGS


def is_other_picture(name: str) -> bool:
    """Whether the ending of a file's name is that of an image format that is not read."""
    return _ending(name) in OTHER_ENDINGS


def is_jpeg(name: str) -> bool:
    """Whether the ending of a file's name is JPEG's, which loses something of every image."""
    return _FORMAT_OF.get(_ending(name)) == "JPEG"


def _ending(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""


def decode_picture(data: bytes, name: str) -> Image.Image:
    """The picture in RGB, whole; BadFile if it is not all there, no 8-bit picture, or larger than the limits."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
            _check_size(*picture.size, name)
            if picture.mode.startswith(("I", "F")):  # convert() would clip these to white
                raise BadFile(name, f"has pixels of type {picture.mode}; they must have 8 bits a channel")
            return picture.convert("RGB")
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        raise BadFile(name, _what_else(data)) from error
    except Image.DecompressionBombError as error:  # tells the number of pixels, before there is a picture to ask
        count = int(re.search(r"\d+", str(error)).group())
        raise BadFile(name, f"has {count:,} pixels; at most {MOST_PIXELS:,} are read") from error
    except Exception as error:  # a damaged file leads its decoder to raise anything
        raise BadFile(name, f"is no whole picture ({in_one_line(error)})") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise BadFile(name, f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are read")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        limit = f"the longer side must be at most {MOST_ELONGATED} times the shorter"
        raise BadFile(name, f"has {width} x {height} pixels; {limit}")


def _what_else(data: bytes) -> str:
    if not data:
        return "is empty"
    return f"is no picture, or of another format than {', '.join(IMAGE_FORMATS)}"


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
