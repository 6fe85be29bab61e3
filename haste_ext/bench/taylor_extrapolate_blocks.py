"""taylor_extrapolate_blocks, all cached modules of a skipped step at once, beside eager loops over the modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference
from haste_ext.bench import taylorseer
from haste_ext.bench.operation import Case, Contender, Operation, Phase


@dataclass(frozen=True)
class NetworkCase(Case):
    """Every attention and MLP output of a SiT: 2 · depth modules with order + 1 snapshots each."""

    width: int
    order: int
    layers: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (L, K, B, N, D), weights (K,), gates (L, B, D), residual (B, N, D)."""
        stream = (self.batch, self.tokens, self.width)
        return [
            self.randn(self.layers, self.order + 1, *stream, seed=0),
            torch.tensor(taylorseer.weights(self.order), device=self.device),
            self.randn(self.layers, self.batch, self.width, seed=1),
            self.randn(*stream, seed=2),
        ]

    def phases(self) -> list[Phase]:
        values, slots = self.batch * self.tokens * self.width, self.order + 1
        size = (self.layers * slots + 2) * values + self.layers * self.batch * self.width
        return [Phase(size * self.element_size + 4 * slots, other_flops=self.layers * (2 * slots + 2) * values)]

    def float64_bytes_per_sample(self) -> int:
        return (self.layers * (self.order + 1) + 6) * 8 * self.tokens * self.width


def prepared_differences(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> tuple:
    return [taylorseer.differences(layer) for layer in snapshots], gates, residual


def eager_recurrence(differences: list[dict[int, Tensor]], gates: Tensor, residual: Tensor) -> Tensor:
    """As TaylorSeer writes it, module by module."""
    for cache, gate in zip(differences, gates, strict=True):
        residual = residual + gate.unsqueeze(1) * taylorseer.forecast(cache)
    return residual


def eager_weighted_sum(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> Tensor:
    for layer, gate in zip(snapshots, gates, strict=True):
        forecast = sum(weight * snapshot for weight, snapshot in zip(weights, layer, strict=True))
        residual = residual + gate.unsqueeze(1) * forecast
    return residual


def one_reduction(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> Tensor:
    """The weighted sum as torch.compile likes it: one reduction, one kernel.

    Unrolled over the modules it takes over a minute to compile for SiT-XL/2 and runs slower than this.
    """
    terms = gates[:, None, :, None] * weights.view(-1, 1, 1, 1) * snapshots
    return (residual + terms.sum((0, 1))).to(residual.dtype)


OPERATION = Operation(
    name="taylor_extrapolate_blocks",
    case=NetworkCase,
    reference=reference.taylor_extrapolate_blocks,
    contenders=(
        Contender("eager, recurrence", eager_recurrence, prepare=prepared_differences),
        Contender("eager, weighted sum", eager_weighted_sum),
        Contender("torch.compile", one_reduction, compiled=True),
        Contender("haste", haste_ext.taylor_extrapolate_blocks),
    ),
    baseline="eager, recurrence",
    results=("forecast",),
    default_batch=2,
    bandwidth_bound=True,
)
