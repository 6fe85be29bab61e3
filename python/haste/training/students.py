"""The students that can be trained: the published sizes of SiT, and those of the recipes."""

from __future__ import annotations

from typing import Any

from haste.errors import UserError
from haste.models.sit import SIT_MODELS

STUDENTS: dict[str, dict[str, Any]] = {
    **SIT_MODELS,
    # 8 x 8 pixels as 16 tokens: small enough for two processor cores.
    "SiT-Digits/2": {"depth": 6, "hidden_size": 96, "num_heads": 4, "patch_size": 2},
}


def student_shape(name: str) -> dict[str, Any]:
    """The arguments of SiT that make the student of this name; UserError, with the known names, if there is none."""
    if name not in STUDENTS:
        raise UserError(f"--model must be one of {', '.join(STUDENTS)}, got {name[:60]!r}")
    return STUDENTS[name]
