"""taylor_extrapolate on CUDA, emulated: against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

from haste_ext import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(emulator, snapshots, weights, gates=None, residual=None):
    """One step, as blocks has it; several where the weights are (S, L, K) and the gates (S, L, B, D)."""
    layers, slots, batch, tokens, dim = snapshots.shape
    of_steps = weights if weights.dim() == 3 else weights.expand(1, layers, slots)
    steps = len(of_steps)
    values = {"steps": steps, "layers": layers, "slots": slots, "batch": batch, "tokens": tokens, "dim": dim}
    out_type = snapshots.dtype if residual is None else residual.dtype
    buffers = {"snapshots": snapshots, "weights": of_steps}
    buffers["out"] = torch.full((steps, batch, tokens, dim), float("nan"), dtype=out_type)
    if gates is not None:
        buffers["gates"] = gates if weights.dim() == 3 else gates.unsqueeze(0)
    if residual is not None:
        buffers["residual"] = residual
    values |= {"snapshot_type": snapshots.dtype, "out_type": out_type}
    out = emulator("taylor_extrapolate", buffers, ("out",), **values)["out"]
    return out if weights.dim() == 3 else out[0]


def check(emulator, snapshots, weights, gates=None, residual=None):
    operands = (snapshots, weights, gates) if weights.dim() == 3 else (snapshots, weights, gates, residual)
    definition = reference.taylor_extrapolate_steps if weights.dim() == 3 else reference.taylor_extrapolate_blocks
    ours, eager = run(emulator, *operands), definition(*operands)
    exact = definition(*(None if x is None else x.double() for x in operands))
    assert_as_accurate_as_eager(ours, eager, exact, f"emulated taylor, {snapshots.dtype} into {ours.dtype}")


def randn(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("snapshot_type", TYPES)
@pytest.mark.parametrize("out_type", TYPES)
def test_every_pair_of_types(emulator, snapshot_type, out_type):
    """Several layers, more slots than are fetched at once, gates and a residual."""
    snapshots = randn((3, 6, 2, 5, 40), snapshot_type)
    gates, residual = randn((3, 2, 40), snapshot_type, 2), randn((2, 5, 40), out_type, 3)
    check(emulator, snapshots, randn((3, 6), seed=1), gates, residual)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", (1, 7, 8, 24, 1152))
def test_one_layer_of_any_dim(emulator, dtype, dim):
    check(emulator, randn((1, 3, 2, 4, dim), dtype), randn((3,), seed=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_operands_where_they_lie(emulator, dtype):
    """Slots of a ring buffer, rows of odd stride, and one element off the 16-byte boundary."""
    snapshots = randn((2, 4, 2, 5, 25), dtype).transpose(0, 1)[1:, :, :, 1:, 1:]
    gates, residual = randn((2, 3, 25), dtype, 1).transpose(0, 1)[..., :24], randn((2, 5, 25), dtype, 2)[:, 1:, :24]
    check(emulator, snapshots, randn((2,), seed=3), gates, residual)


def test_a_slot_of_weight_zero_is_not_read(emulator):
    snapshots = randn((1, 6, 1, 3, 16))
    snapshots[:, (1, 5)] = float("nan")
    weights = randn((6,), seed=1)
    weights[[1, 5]] = 0
    check(emulator, snapshots, weights)


def test_more_than_one_block(emulator):
    check(emulator, randn((1, 1, 2, 300, 16), torch.bfloat16), torch.tensor([0.5]))


@pytest.mark.parametrize("shape", ((1, 2, 0, 3, 8), (1, 2, 2, 0, 8)))
def test_nothing_to_do(emulator, shape):
    assert run(emulator, torch.zeros(shape), torch.ones(2)).shape == shape[2:]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("steps", (1, 2, 3, 4, 5, 8, 9, 17))
def test_any_number_of_steps(emulator, dtype, steps):
    """Of one, two and three passes over the snapshots."""
    snapshots, gates = randn((3, 5, 2, 5, 40), dtype), randn((steps, 3, 2, 40), dtype, 2)
    check(emulator, snapshots, randn((steps, 3, 5), seed=1), gates)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("slots", range(1, 12))
def test_any_number_of_slots(emulator, dtype, slots):
    for dim, steps in ((40, 3), (40, 1), (41, 2)):
        snapshots, gates = randn((4, slots, 2, 3, dim), dtype), randn((steps, 4, 2, dim), dtype, 2)
        check(emulator, snapshots, randn((steps, 4, slots), seed=1), gates)
        check(emulator, snapshots, randn((steps, 4, slots), seed=1))


@pytest.mark.parametrize(("layers", "slots"), ((200, 5), (700, 1), (3, 800)))
def test_more_weights_than_shared_memory_holds(emulator, layers, slots):
    """For several batch entries, each of which must get all of them."""
    weights = randn((3, layers, slots), seed=1) / slots
    snapshots, gates = randn((layers, slots, 2, 3, 8), torch.bfloat16), randn((3, layers, 2, 8), torch.bfloat16, 2)
    check(emulator, snapshots, weights, gates)


@pytest.mark.parametrize("dim", (16, 17))
def test_a_slot_adds_nothing_at_a_step_where_it_has_no_weight(emulator, dim):
    snapshots = randn((2, 3, 1, 3, dim))
    weights = randn((3, 2, 3), seed=1)
    weights[:, :, 0], weights[1:, :, 2] = 0, 0
    clean = run(emulator, snapshots, weights)
    snapshots[:, 0], snapshots[:, 2] = float("nan"), float("inf")
    out = run(emulator, snapshots, weights)
    assert torch.equal(out[1:], clean[1:]) and not out[0].isfinite().any()


def test_operands_of_several_steps_where_they_lie(emulator):
    """Gates of a larger tensor with the steps last, weights with the slots first."""
    snapshots = randn((2, 5, 2, 3, 26), torch.bfloat16)[..., 1:25]
    gates = randn((2, 2, 3, 32), torch.bfloat16, 1).permute(2, 0, 1, 3)[..., :24]
    check(emulator, snapshots, randn((5, 2, 3), seed=2).permute(2, 1, 0), gates)


def test_several_steps_take_no_residual(emulator):
    with pytest.raises(emulator.Refused, match="without a residual"):
        run(emulator, randn((1, 1, 1, 1, 8)), torch.ones(2, 1, 1), residual=randn((1, 1, 8)))


def test_refuses_float64(emulator):
    with pytest.raises(emulator.Refused, match="not float64"):
        run(emulator, torch.zeros(1, 1, 1, 1, 8, dtype=torch.float64), torch.ones(1))
