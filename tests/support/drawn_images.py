"""What `haste sample` left, read whole through the reader that `haste evaluate` uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from haste.data.images import open_images


def read_images(folder: Path) -> np.ndarray:
    """All images of a folder in the order of their names, (N, H, W, 3) uint8."""
    return np.concatenate(list(open_images(folder, "--samples").batches(64)))


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, H, W, 3) uint8 of an .npz and, if the file has them, labels (N,)."""
    images = open_images(path, "--samples")
    return np.concatenate(list(images.batches(64))), images.labels
