"""The golden numbers of xAR and MM-DiT (tests/haste/models/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from haste.models import build_model
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "haste" / "models" / "golden"


def read_golden(name: str) -> dict[str, Tensor]:
    """The arrays of a file; int16 is the upper half of float32, as bfloat16 has it."""
    arrays = np.load(GOLDEN / name)
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
    return {key: x.view(torch.bfloat16).float() if x.dtype == torch.int16 else x for key, x in tensors.items()}


def golden_config(family: str) -> dict[str, Any]:
    return {"family": family, **json.loads(str(np.load(GOLDEN / f"{family}_model.npz")["config"]))}


def golden_model(family: str, dtype: torch.dtype) -> Any:
    model = build_model(golden_config(family))
    buffers = {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    model.load_state_dict({**buffers, **read_golden(f"{family}_model.npz")}, strict=True)
    return model.to(dtype).eval()
