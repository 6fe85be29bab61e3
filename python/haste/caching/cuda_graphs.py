"""Calls of a cached model as CUDA graphs: captured when first made, replayed for the rest of the run and the next.

A replay reads and writes the memory that was there at capture. Images, times, labels and weights are therefore copied
into tensors that stay; the cached features are read where they are, and a full call writes to another tensor,
which is copied to the slot of the moment. So one graph of each kind serves all steps and slots. Where guidance changes
the batch, or the cached features move, others are captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haste.cuda_graphs import Graphed, shape_of


class GraphedFull(Graphed):
    """full(x, t, y, out); `out` is filled from the tensor that the graph writes to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, kept=3)
        self._features: dict[tuple, Tensor] = {}

    def release(self) -> None:
        super().release()
        self._features.clear()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Any:
        if shape_of(out) not in self._features:
            self._features[shape_of(out)] = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        features = self._features[shape_of(out)]
        output = super().__call__(x, t, y, features)
        out.copy_(features)
        return output


# By the names of a granularity's functions; cached features are read where they are.
GRAPHED: dict[str, Callable[[Callable[..., Any]], Graphed]] = {
    "full": GraphedFull,
    "forecast": partial(Graphed, kept=3),
    "corrections": partial(Graphed, kept=2),
    "corrected": Graphed,
}
