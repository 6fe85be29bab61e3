"""A plug-in of real images that need no download: scikit-learn's handwritten digits, a teacher, a classifier, a preset.

Nothing imports it but haste.registry, by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haste.errors import require

if TYPE_CHECKING:
    import torch

# A model and a teacher that two processor cores train in minutes.
PRESET: dict[str, Any] = {
    "exp_name": "digits",
    "data_dir": "digits",
    "resolution": 8,
    "model": "SiT-Digits/2",
    "enc_type": "digits-vit",
    "layer_map": "0:0,1:1,2:2,3:3",
    "encoder_depth": 4,
    "projector_dim": 256,
    "attn_coeff": 0.5,
    "early_stop_point": 500,
    "batch_size": 64,
    "max_train_steps": 1000,
    "learning_rate": 4e-3,
    "ema_decay": 0.99,
    "mixed_precision": "no",
    "logging_steps": 10,
    "checkpointing_steps": 200,
    "sampling_steps": 200,
}


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """images (1797, 1, 8, 8), float32, ink = 1 on paper = -1; labels (1797,), int64, 0 to 9.

    Source: UCI, Optical Recognition of Handwritten Digits (test part).
    """
    import numpy as np
    import torch  # the preset is read where nobody needs it

    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)  # 0 to 16
    return images / 8 - 1, torch.from_numpy(digits.target.astype(np.int64))
