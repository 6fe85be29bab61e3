"""Classifier-free guidance: when it is on, and how its two halves are evaluated.

v = v_null + scale·(v_label − v_null)  (arXiv 2207.12598), only while low ≤ t ≤ high  (arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from haste.bounds import check_number
from haste.errors import UserError

Branches = tuple[str, ...]

LABEL: Branches = ("label",)
NULL: Branches = ("null",)
BOTH: Branches = ("label", "null")

MODES = ("batched", "separate")


@dataclass(frozen=True)
class Guidance:
    """scale: 1 is none. low, high: a step is guided only if it starts at low ≤ t ≤ high. null_label: the class that
    stands for none. mode: batched evaluates both halves as one batch of twice the size, separate one after the other.
    channels: so many, the first ones, are guided and the others are those of the label; None guides all.

    Raises UserError for settings that make no sense.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    null_label: int | None = None
    mode: Literal["batched", "separate"] = "batched"
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("cfg_scale", self.scale), ("guidance_low", self.low), ("guidance_high", self.high)):
            check_number(name, value, shown=name)
        if self.scale > 1 and self.null_label is None:
            raise UserError(f"cfg_scale is {self.scale}, so null_label must be given: the class that stands for none")
        if not self.low <= self.high:
            raise UserError(f"guidance_low is {self.low}; it must not be above guidance_high, {self.high}")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guided_channels must be at least 1, or None for all, got {self.channels}")
        if self.mode not in MODES:
            raise UserError(f"guidance is {self.mode!r}; it must be {' or '.join(MODES)}")

    def calls(self, time: float) -> list[Branches]:
        """The calls of the model that one velocity takes in a step that starts at `time`, each by its branches."""
        if self.scale == 1 or not self.low <= time <= self.high:
            return [LABEL]
        return [BOTH] if self.mode == "batched" else [LABEL, NULL]

    def combine(self, v_label: Tensor, v_null: Tensor) -> Tensor:
        """The guided velocity (B, C, S, S) of that of the label and that of none."""
        guided = v_null + self.scale * (v_label - v_null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], v_label[:, self.channels :]], dim=1)
