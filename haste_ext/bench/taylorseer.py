"""TaylorSeer's forecast (arXiv 2503.06923) two ways: by its finite differences, and by the weights they amount to.

At a full step s, with d the distance to the full step before it, T_0 = F(s) and T_{i+1} = (T_i − T_i,old) / d for
i < order; x steps later F̂ = Σ_i T_i · x^i / i!. With full steps an interval apart, T_i is the i-th backward difference
over interval^i, so F̂ is a weighted sum of the last order + 1 snapshots.
"""

from __future__ import annotations

from math import comb, factorial

import torch
from torch import Tensor

INTERVAL = 4  # steps from one full step to the next
AHEAD = 2  # steps from the last full step to the forecast


def weights(order: int, ahead: int = AHEAD, interval: int = INTERVAL) -> list[float]:
    """The weight of each snapshot, newest first."""
    return [
        sum(
            (ahead / interval) ** i / factorial(i) * (-1) ** slot * comb(i, slot)  # of snapshot `slot` in T_i·x^i/i!
            for i in range(slot, order + 1)
        )
        for slot in range(order + 1)
    ]


def differences(snapshots: Tensor, interval: int = INTERVAL) -> dict[int, Tensor]:
    """T_0 … T_order from the snapshots (order + 1, ...), newest first, as a cache of finite differences keeps them."""
    cache: dict[int, Tensor] = {}
    for feature in reversed(snapshots.unbind()):
        cache = updated(cache, feature, len(snapshots) - 1, interval)
    return cache


def updated(cache: dict[int, Tensor], feature: Tensor, order: int, interval: int) -> dict[int, Tensor]:
    """What a full step does to the cache."""
    new = {0: feature}
    for i in range(order):
        if i not in cache:
            break
        new[i + 1] = (new[i] - cache[i]) / interval
    return new


def forecast(cache: dict[int, Tensor], ahead: int = AHEAD) -> Tensor:
    """Σ_i T_i · x^i / i! as published, term by term."""
    total = torch.zeros_like(cache[0])
    for i, term in cache.items():
        total = total + (1 / factorial(i)) * term * ahead**i
    return total
