"""How good drawn pictures are: their distance to real ones, and their agreement with what all steps draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from haste.evaluation.agreement import compare_pictures
from haste.evaluation.features import Extractor, Features, JudgeExtractor, concatenate
from haste.evaluation.frechet import fit_gaussian, frechet_distance
from haste.evaluation.metrics import accuracy
from haste.evaluation.reference import Reference


class Quality:
    """The features of a network, and the real side in them. UserError if that has too few pictures for a distance."""

    def __init__(self, extractor: Extractor, reference: Reference) -> None:
        self.extractor = extractor
        self.reference = reference
        self.real = reference.gaussian

    @property
    def key(self) -> str:
        """What must be equal for two distances to be compared."""
        return f"{self.extractor.key} against {self.reference.name}"

    def features(self, images: np.ndarray) -> Features:
        """Of one batch (n, H, W, 3) uint8."""
        return self.extractor(images)

    def score(self, parts: Sequence[Features], labels: np.ndarray) -> dict[str, Any]:
        """distance: Fréchet, to the real side. accuracy: the share of pictures, 0 to 1, in which the judge of the
        digits reads the label that was asked for; None for other networks, whose classes need not be the model's."""
        features = concatenate(parts)
        known = isinstance(self.extractor, JudgeExtractor)
        return {
            "distance": frechet_distance(fit_gaussian(features.values), self.real),
            "accuracy": accuracy(features, labels) if known else None,
        }


def agreement(images: np.ndarray, twins: np.ndarray) -> dict[str, Any]:
    """Of pictures (N, H, W, 3) uint8 with those that the same noise gives otherwise.

    psnr: in dB, of the mean squared error over all pictures; None if all are identical. ssim: its mean.
    """
    compared = compare_pictures(images, twins)
    error = np.mean(10.0 ** (-compared.psnr / 10.0))  # mean squared error over 255²
    return {"psnr": float(-10.0 * np.log10(error)) if error > 0 else None, "ssim": float(compared.ssim.mean())}
