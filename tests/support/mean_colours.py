"""A small network that stands for the one whose features are taken."""

from __future__ import annotations

import numpy as np
from haste.metrics.features import Features


class MeanColours:
    """A network of 3 features, the mean of each channel, and 2 classes, by how bright an image is. Counts its work."""

    key = "mean-colours"
    dimension = 3
    classes = None

    def __init__(self) -> None:
        self.seen = 0

    def describe(self) -> str:
        return "mean colours"

    def __call__(self, images: np.ndarray) -> Features:
        self.seen += len(images)
        means = images.mean(axis=(1, 2), dtype=np.float64)
        bright = means.mean(axis=1) / 255.0
        return Features(means, np.stack([bright, 1.0 - bright], axis=1))
