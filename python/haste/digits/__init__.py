"""scikit-learn's handwritten digits: 1,797 real images that come inside the package, nothing to download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn import datasets


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """images (1797, 1, 8, 8), float32, ink = 1 on paper = -1; labels (1797,), int64, 0 to 9.

    Source: UCI, Optical Recognition of Handwritten Digits (test part).
    """
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)  # 0 to 16
    return images / 8 - 1, torch.from_numpy(digits.target.astype(np.int64))
