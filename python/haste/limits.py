"""What a file may ask for. Each is held against the file before memory is taken for it, and said with the refusal."""

from __future__ import annotations

LARGEST_JSON = 256 * 2**20  # bytes; the labels of ImageNet take 60 MB
LARGEST_FILE = 2**30  # bytes of an image, or of the latents of one, also inside a zip
MOST_PIXELS = 100_000_000  # of one image: 400 MB in memory, 10,000 x 10,000
MOST_ELONGATED = 100  # the longer side over the shorter; the crop first brings the shorter one to --resolution
LARGEST_ARRAY = 16 * 2**30  # bytes; ImageNet in 2,048 features takes 10.5 GB
SMALL_ARRAY = 64 * 2**20  # bytes; below, an array may be packed as tightly as it likes
MOST_INFLATION = 100  # bytes of an array over its bytes in the file; numbers that were measured do not pack so well
MOST_CLASSES = 1_000_000  # each takes a row of the label table: at a width of 1,152, 4.6 GB, and four of them to train
LARGEST_HEADER = 2**16  # bytes in front of an array


def in_bytes(size: int) -> str:
    """A number of bytes, for a sentence."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size} bytes"
