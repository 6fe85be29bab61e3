"""What `haste sample` left, read whole through the reader that `haste evaluate` uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from haste.evaluation.picture_sets import open_pictures


def read_pictures(folder: Path) -> np.ndarray:
    """All pictures of a folder in the order of their names, (N, H, W, 3) uint8."""
    return np.concatenate(list(open_pictures(folder, "--samples").batches(64)))


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures (N, H, W, 3) uint8 of an .npz and, if the file has them, labels (N,)."""
    pictures = open_pictures(path, "--samples")
    return np.concatenate(list(pictures.batches(64))), pictures.labels
