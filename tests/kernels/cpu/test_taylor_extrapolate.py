"""The taylor_extrapolate operations on every instruction set, against the sum in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

import haste_ext
from haste_ext import reference

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def numbers(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("snapshot_type", TYPES)
@pytest.mark.parametrize("residual_type", (None, *TYPES))
@pytest.mark.parametrize("dim", (1, 7, 33, 130))
def test_values(isa, snapshot_type, residual_type, dim):
    layers, slots, batch, tokens = 3, 4, 2, 5
    snapshots = numbers((layers, batch, tokens, slots, dim), snapshot_type, 0).permute(0, 3, 1, 2, 4)
    weights, gates = numbers((layers, slots), torch.float32, 1), numbers((layers, batch, dim), snapshot_type, 2)
    residual = None if residual_type is None else numbers((batch, tokens, dim), residual_type, 3)
    out = haste_ext.taylor_extrapolate_blocks(snapshots, weights, gates, residual)
    wide = (None if x is None else x.double() for x in (snapshots, weights, gates, residual))
    exact = reference.taylor_extrapolate_blocks(*wide)
    assert out.dtype == (residual_type or snapshot_type)
    if torch.float64 in (snapshot_type, residual_type):
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(out.dtype).eps * exact.abs().max())
    else:
        eager = reference.taylor_extrapolate_blocks(snapshots, weights, gates, residual)
        assert_as_accurate_as_eager(out, eager, exact, f"{snapshot_type} {residual_type}")


@pytest.mark.parametrize("dim", (5, 200))
def test_a_slot_without_weight_is_not_read(isa, dim):
    snapshots = numbers((3, 2, 4, dim), torch.float32, 0)
    weights = torch.tensor([0.5, 0.0, -2.0])
    clean = haste_ext.taylor_extrapolate(snapshots, weights)
    snapshots[1] = float("nan")
    assert torch.equal(haste_ext.taylor_extrapolate(snapshots, weights), clean)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("dim", (1, 33, 130))
def test_any_number_of_steps(isa, dtype, steps, dim):
    layers, slots, batch, tokens = 3, 4, 2, 5
    snapshots = numbers((layers, slots, tokens, batch, dim), dtype, 0).transpose(2, 3)
    weights, gates = numbers((steps, layers, slots), torch.float32, 1), numbers((steps, layers, batch, dim), dtype, 2)
    out = haste_ext.taylor_extrapolate_steps(snapshots, weights, gates)
    exact = reference.taylor_extrapolate_steps(snapshots.double(), weights.double(), gates.double())
    assert out.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max())
    else:
        eager = reference.taylor_extrapolate_steps(snapshots, weights, gates)
        assert_as_accurate_as_eager(out, eager, exact, f"{steps} steps {dtype}")


@pytest.mark.parametrize("dim", (5, 200))
def test_a_slot_adds_nothing_at_a_step_where_it_has_no_weight(isa, dim):
    snapshots = numbers((3, 2, 4, dim), torch.float32, 0)
    weights = torch.tensor([[0.5, 0.0, -2.0], [1.0, 3.0, 0.25], [0.0, 0.0, 1.0]])
    clean = haste_ext.taylor_extrapolate_steps(snapshots, weights)
    snapshots[1] = float("nan")
    out = haste_ext.taylor_extrapolate_steps(snapshots, weights)
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and out[1].isnan().all()
