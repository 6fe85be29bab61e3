"""taylor_extrapolate, one cached module of a skipped step, beside TaylorSeer's recurrence and eager weighted sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference
from haste_ext.bench import taylorseer
from haste_ext.bench.operation import Case, Contender, Operation, Phase


@dataclass(frozen=True)
class ModuleCase(Case):
    """One attention or MLP output of a SiT, order + 1 snapshots of it, its gate and the residual stream."""

    width: int
    order: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (K, B, N, D), weights (K,), residual (B, N, D), gate (B, D)."""
        stream = (self.batch, self.tokens, self.width)
        return [
            self.randn(self.order + 1, *stream, seed=0),
            torch.tensor(taylorseer.weights(self.order), device=self.device),
            self.randn(*stream, seed=1),
            self.randn(self.batch, self.width, seed=2),
        ]

    def phases(self) -> list[Phase]:
        values, slots = self.batch * self.tokens * self.width, self.order + 1
        size = (slots + 2) * values + self.batch * self.width
        return [Phase(size * self.element_size + 4 * slots, other_flops=(2 * slots + 2) * values)]

    def float64_bytes_per_sample(self) -> int:
        return (self.order + 6) * 8 * self.tokens * self.width


def prepared_differences(snapshots: Tensor, weights: Tensor, residual: Tensor, gate: Tensor) -> tuple:
    return taylorseer.differences(snapshots), residual, gate


def eager_recurrence(differences: dict[int, Tensor], residual: Tensor, gate: Tensor) -> Tensor:
    """As TaylorSeer writes it."""
    return residual + gate.unsqueeze(1) * taylorseer.forecast(differences)


def eager_weighted_sum(snapshots: Tensor, weights: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    forecast = sum(weight * snapshot for weight, snapshot in zip(weights, snapshots, strict=True))
    return residual + gate.unsqueeze(1) * forecast


OPERATION = Operation(
    name="taylor_extrapolate",
    case=ModuleCase,
    reference=reference.taylor_extrapolate,
    contenders=(
        Contender("eager, recurrence", eager_recurrence, prepare=prepared_differences),
        Contender("eager, weighted sum", eager_weighted_sum),
        Contender("torch.compile", eager_weighted_sum, compiled=True),
        Contender("haste", haste_ext.taylor_extrapolate),
    ),
    baseline="eager, recurrence",
    results=("forecast",),
    default_batch=32,
    bandwidth_bound=True,
)
