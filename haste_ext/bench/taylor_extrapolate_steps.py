"""taylor_extrapolate_steps, all cached modules at all skipped steps at once, beside a call for every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference
from haste_ext.bench import taylorseer
from haste_ext.bench.operation import Contender, Operation, Phase
from haste_ext.bench.taylor_extrapolate_blocks import NetworkCase, one_reduction


@dataclass(frozen=True)
class SkippedStepsCase(NetworkCase):
    """The modules of NetworkCase, and the `steps` steps that follow a full one: the first, the second, ..."""

    steps: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (L, K, B, N, D), weights (S, K), gates (S, L, B, D)."""
        weights = [taylorseer.weights(self.order, ahead, self.steps + 1) for ahead in range(1, self.steps + 1)]
        return [
            self.randn(self.layers, self.order + 1, self.batch, self.tokens, self.width, seed=0),
            torch.tensor(weights, device=self.device),
            self.randn(self.steps, self.layers, self.batch, self.width, seed=1),
        ]

    def phases(self) -> list[Phase]:
        values, slots = self.batch * self.tokens * self.width, self.order + 1
        size = (self.layers * slots + self.steps) * values + self.steps * self.layers * self.batch * self.width
        flops = self.steps * self.layers * (2 * slots + 2) * values
        return [Phase(size * self.element_size + 4 * self.steps * slots, other_flops=flops)]


def prepared_differences(snapshots: Tensor, weights: Tensor, gates: Tensor) -> tuple:
    return [taylorseer.differences(layer, interval=len(weights) + 1) for layer in snapshots], gates


def eager_recurrence(differences: list[dict[int, Tensor]], gates: Tensor) -> Tensor:
    """As TaylorSeer writes it, step by step and module by module."""
    steps = []
    for ahead, of_step in enumerate(gates, start=1):
        total = torch.zeros_like(differences[0][0])
        for cache, gate in zip(differences, of_step, strict=True):
            total = total + gate.unsqueeze(1) * taylorseer.forecast(cache, ahead)
        steps.append(total)
    return torch.stack(steps)


def reductions(snapshots: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
    """One reduction per step, as torch.compile likes it: it may read the snapshots once for all of them."""
    zero = torch.zeros_like(snapshots[0, 0])
    return torch.stack(
        [one_reduction(snapshots, w, g, zero) for w, g in zip(weights.unbind(), gates.unbind(), strict=True)]
    )


def call_by_call(snapshots: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
    """taylor_extrapolate_blocks for one step after the other."""
    calls = zip(weights.unbind(), gates.unbind(), strict=True)
    return torch.stack([haste_ext.taylor_extrapolate_blocks(snapshots, w, g) for w, g in calls])


OPERATION = Operation(
    name="taylor_extrapolate_steps",
    case=SkippedStepsCase,
    reference=reference.taylor_extrapolate_steps,
    contenders=(
        Contender("eager, recurrence", eager_recurrence, prepare=prepared_differences),
        Contender("torch.compile", reductions, compiled=True),
        Contender("haste, step by step", call_by_call),
        Contender("haste", haste_ext.taylor_extrapolate_steps),
    ),
    baseline="eager, recurrence",
    results=("corrections",),
    default_batch=2,
    bandwidth_bound=True,
)
