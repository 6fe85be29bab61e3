"""The golden numbers of xAR (tests/haste/models/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from haste.models import XAR, build_model
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "haste" / "models" / "golden"


def read_golden(name: str) -> dict[str, Tensor]:
    """The arrays of a file."""
    arrays = np.load(GOLDEN / name)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}


def golden_model(dtype: torch.dtype) -> XAR:
    config = json.loads(str(np.load(GOLDEN / "xar_model.npz")["config"]))
    model = build_model({"family": "xar", **config})
    model.load_state_dict(read_golden("xar_model.npz"), strict=True)
    return model.to(dtype).eval()
