"""taylor_extrapolate on CUDA, emulated: against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

from haste_ext import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(emulator, snapshots, weights, gates=None, residual=None):
    layers, slots, batch, tokens, dim = snapshots.shape
    values = {"layers": layers, "slots": slots, "batch": batch, "tokens": tokens, "dim": dim}
    out_type = snapshots.dtype if residual is None else residual.dtype
    buffers = {"snapshots": snapshots, "weights": weights.expand(layers, slots)}
    buffers["out"] = torch.full((batch, tokens, dim), float("nan"), dtype=out_type)
    if gates is not None:
        buffers["gates"] = gates
    if residual is not None:
        buffers["residual"] = residual
    values |= {"snapshot_type": snapshots.dtype, "out_type": out_type}
    return emulator("taylor_extrapolate", buffers, ("out",), **values)["out"]


def check(emulator, snapshots, weights, gates=None, residual=None):
    ours = run(emulator, snapshots, weights, gates, residual)
    eager = reference.taylor_extrapolate_blocks(snapshots, weights, gates, residual)
    doubles = (None if x is None else x.double() for x in (snapshots, weights, gates, residual))
    exact = reference.taylor_extrapolate_blocks(*doubles)
    assert_as_accurate_as_eager(ours, eager, exact, f"emulated taylor, {snapshots.dtype} into {ours.dtype}")


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("snapshot_type", TYPES)
@pytest.mark.parametrize("out_type", TYPES)
def test_every_pair_of_types(emulator, snapshot_type, out_type):
    """Several layers, more slots than are fetched at once, gates and a residual."""
    snapshots = draw((3, 6, 2, 5, 40), snapshot_type)
    check(emulator, snapshots, draw((3, 6), seed=1), draw((3, 2, 40), snapshot_type, 2), draw((2, 5, 40), out_type, 3))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", (1, 7, 8, 24, 1152))
def test_one_layer_of_any_dim(emulator, dtype, dim):
    check(emulator, draw((1, 3, 2, 4, dim), dtype), draw((3,), seed=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_operands_where_they_lie(emulator, dtype):
    """Slots of a ring buffer, rows of odd stride, and one element off the 16-byte boundary."""
    snapshots = draw((2, 4, 2, 5, 25), dtype).transpose(0, 1)[1:, :, :, 1:, 1:]
    gates, residual = draw((2, 3, 25), dtype, 1).transpose(0, 1)[..., :24], draw((2, 5, 25), dtype, 2)[:, 1:, :24]
    check(emulator, snapshots, draw((2,), seed=3), gates, residual)


def test_a_slot_of_weight_zero_is_not_read(emulator):
    snapshots = draw((1, 6, 1, 3, 16))
    snapshots[:, (1, 5)] = float("nan")
    weights = draw((6,), seed=1)
    weights[[1, 5]] = 0
    check(emulator, snapshots, weights)


def test_more_than_one_block(emulator):
    check(emulator, draw((1, 1, 2, 300, 16), torch.bfloat16), torch.tensor([0.5]))


@pytest.mark.parametrize("shape", ((1, 2, 0, 3, 8), (1, 2, 2, 0, 8)))
def test_nothing_to_do(emulator, shape):
    assert run(emulator, torch.zeros(shape), torch.ones(2)).shape == shape[2:]


def test_refuses_float64(emulator):
    with pytest.raises(emulator.Refused, match="not float64"):
        run(emulator, torch.zeros(1, 1, 1, 1, 8, dtype=torch.float64), torch.ones(1))
