"""A zip that claims more than it holds."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path


def write_overlapping(path: Path) -> Path:
    """Two entries that share their bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", bytes(10_000))
        twice = copy.copy(archive.filelist[0])
        twice.filename = "m/data/0"
        archive.filelist.append(twice)
    return path
