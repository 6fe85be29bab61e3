"""By what a run knows its data again, wherever it lies: cheap, so that it can be looked at with every start.

    images   how many samples there are
    names    a checksum of the files' names in their folder or zip, in order; of a Hugging Face data set its fingerprint
    labels   a checksum of all labels
    files    checksums of a few files, spread over all: latents that were made anew keep their names and sizes
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from haste.data.bad_files import BadFile

LOOKED_AT = 16  # files


def fingerprint(count: int, names: bytes, labels: np.ndarray | None, read: Callable[[int], bytes]) -> dict[str, Any]:
    """names: what tells them all apart. labels: (count,) int64. read: the bytes of a sample's file."""
    chosen = sorted({index * (count - 1) // max(LOOKED_AT - 1, 1) for index in range(LOOKED_AT)})
    return {
        "images": count,
        "names": checksum(names),
        "labels": None if labels is None else checksum(labels.astype(np.int64).tobytes()),
        "files": [_checksum_of_file(read, index) for index in chosen],
    }


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checksum_of_file(read: Callable[[int], bytes], index: int) -> int | None:
    """None for a file that cannot be read, which --on-bad-file judges when its turn comes."""
    try:
        return zlib.crc32(read(index))
    except BadFile:
        return None


def describe_change(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In a few words, what is other now than in the fingerprint of the run's data when it began; nothing if it is the
    same, as far as that one tells. A file may have been restored: fewer than half of those looked at may be other ones.
    """
    if began.get("images", now["images"]) != now["images"]:
        return [f"{now['images']} images, which were {began['images']}"]
    changes = []
    if began.get("names", now.get("names")) != now.get("names"):
        changes.append("other names of files")
    if began.get("labels", now.get("labels")) != now.get("labels"):
        changes.append("other labels")
    before, after = began.get("files") or [], now.get("files") or []
    other = sum(a != b for a, b in zip(before, after, strict=False) if None not in (a, b))
    if not changes and 2 * other >= len(after) > 0:
        changes.append(f"other files ({other} of the {len(after)} that are looked at)")
    return changes


def other_latents(began: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two formats of latents, as plain values, give other numbers. The VAE itself may have moved."""
    names = ("channels", "factor", "shift", "scale")
    return not all(np.array_equal(began.get(name, now[name]), now[name]) for name in names)
