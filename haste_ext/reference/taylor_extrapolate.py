"""The forecast of cached features as sums over slots and layers, in the type of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def taylor_extrapolate(
    snapshots: Tensor, weights: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """residual + gate ⊙ Σ_k weights_k · snapshot_k; see haste_ext.taylor_extrapolate."""
    gates = None if gate is None else gate.unsqueeze(0)
    return taylor_extrapolate_blocks(snapshots.unsqueeze(0), weights, gates, residual)


def taylor_extrapolate_blocks(
    snapshots: Tensor, weights: Tensor, gates: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """residual + Σ_l gates_l ⊙ Σ_k weights_{l,k} · snapshot_{l,k}; see haste_ext.taylor_extrapolate_blocks."""
    layers, slots, *shape = snapshots.shape
    weights = weights.expand(layers, slots)
    out_type = snapshots.dtype if residual is None else residual.dtype
    out = snapshots.new_zeros(shape, dtype=out_type) if residual is None else residual
    for layer in range(layers):
        forecast = snapshots.new_zeros(shape)
        for slot in range(slots):
            if weights[layer, slot] != 0:  # an unused slot is not read: it may hold NaN
                forecast = forecast + weights[layer, slot].to(snapshots.dtype) * snapshots[layer, slot]
        if gates is not None:
            forecast = gates[layer].unsqueeze(1) * forecast
        out = out + forecast.to(out_type)
    return out


def taylor_extrapolate_steps(snapshots: Tensor, weights: Tensor, gates: Tensor | None = None) -> Tensor:
    """Σ_l gates_{s,l} ⊙ Σ_k weights_{s,l,k} · snapshot_{l,k} for every s; see haste_ext.taylor_extrapolate_steps."""
    if snapshots.dim() == 4:
        snapshots = snapshots.unsqueeze(0)
    steps = [
        taylor_extrapolate_blocks(snapshots, of_step, None if gates is None else gates[step])
        for step, of_step in enumerate(weights)
    ]
    return torch.stack(steps) if steps else snapshots.new_empty((0, *snapshots.shape[2:]))
