"""The exponential moving average of the weights, which is what samples are drawn with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from haste.training.launch import own


class EMA:
    """A second copy of a model that follows the first: ema ← decay·ema + (1 − decay)·weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One fused pass over all parameters, or over this process's shares of them."""
        averages = [own(parameter) for parameter in self.model.parameters()]
        torch._foreach_lerp_(averages, [own(parameter) for parameter in model.parameters()], 1 - self.decay)
