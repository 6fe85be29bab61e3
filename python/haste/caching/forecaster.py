"""How a skipped step is predicted: as a weighted sum of snapshots of full steps, with weights made on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haste.errors import UserError


@dataclass(frozen=True)
class TaylorForecaster:
    """TaylorSeer's forecast as published (arXiv 2503.06923).

    At a full step s, with d the distance to the full step before it,

        T_0 = F(s),   T_{i+1} = (T_i − T_i,old) / d    for i < order,

    and x steps later F̂ = Σ_i T_i · x^i / i!. The published coordinate counts down; the sign cancels in T_i·x^i.

    T_i is a linear combination of the last i + 1 full features, so F̂ is one of the last order + 1. Every difference
    is divided by the *last* distance alone, so from order 2 on this is not the interpolating polynomial.
    """

    order: int

    def __post_init__(self) -> None:
        if self.order < 0:
            raise UserError(f"order is {self.order}; it must be at least 0")

    @property
    def num_snapshots(self) -> int:
        """How many full features the forecast can use."""
        return self.order + 1

    def weights(self, positions: Sequence[float], at: float) -> list[float]:
        """The weight of each snapshot in the forecast.

        Args:
            positions: where the snapshots were taken, newest first, all different. Fewer than num_snapshots, as early
                in a run, give a forecast of lower order; more are not looked at and get weight 0.
            at: where to forecast.
        """
        used = min(len(positions), self.num_snapshots)
        distances = [newer - older for newer, older in zip(positions[: used - 1], positions[1:used], strict=True)]
        # terms[j]: T_i as it stood when snapshot j was the newest, by its coefficients over the snapshots; i grows.
        terms = [[float(j == k) for k in range(len(positions))] for j in range(used)]
        weights = [0.0] * len(positions)
        factor = 1.0  # x^i / i!
        for i in range(used):
            weights = [total + factor * coefficient for total, coefficient in zip(weights, terms[0], strict=True)]
            factor *= (at - positions[0]) / (i + 1)
            terms = [
                [(a - b) / d for a, b in zip(term, older, strict=True)]
                for term, older, d in zip(terms[:-1], terms[1:], distances[: len(terms) - 1], strict=True)
            ]
        return weights
