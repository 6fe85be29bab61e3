"""The taylor_extrapolate operations against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import haste_ext
from haste_ext import reference

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def double(x):
    return None if x is None else x.double()


def check_blocks(snapshots, weights, gates, residual):
    exact = reference.taylor_extrapolate_blocks(double(snapshots), double(weights), double(gates), double(residual))
    eager = reference.taylor_extrapolate_blocks(snapshots, weights, gates, residual)
    ours = haste_ext.taylor_extrapolate_blocks(snapshots, weights, gates, residual)
    assert ours.dtype == (snapshots if residual is None else residual).dtype
    assert_as_accurate_as_eager(ours, eager, exact, f"blocks {snapshots.dtype}")


@pytest.mark.parametrize("snapshot_type", TYPES)
@pytest.mark.parametrize("residual_type", TYPES)
def test_values_of_all_type_pairs(snapshot_type, residual_type, device):
    if device == "cuda" and torch.float64 in (snapshot_type, residual_type):
        pytest.skip("float64 is for the CPU")
    snapshots, gates = torch.randn(3, 4, 2, 17, 72).to(device, snapshot_type), torch.randn(3, 2, 72)
    residual, weights = torch.randn(2, 17, 72).to(device, residual_type), torch.randn(4).to(device)
    check_blocks(snapshots, weights, gates.to(snapshots), residual)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_layout(device, data):
    draw = data.draw
    layers, slots, batch, tokens, dim = (
        draw(st.integers(low, high)) for low, high in ((1, 4), (1, 5), (0, 3), (0, 9), (1, 70))
    )
    dtype = draw(st.sampled_from(TYPES[1:] if device == "cuda" else TYPES))
    snapshots = torch.randn(slots, layers, tokens, batch, dim).to(device, dtype).permute(1, 0, 3, 2, 4)
    weights = torch.randn((layers, slots) if draw(st.booleans()) else (slots,), device=device)
    gates = torch.randn(layers, batch, 6 * dim).to(snapshots)[..., dim : 2 * dim] if draw(st.booleans()) else None
    residual = torch.randn(tokens, batch, dim, device=device).transpose(0, 1) if draw(st.booleans()) else None
    check_blocks(snapshots, weights, gates, residual)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steps_of_any_shape_and_layout(device, data):
    draw = data.draw
    steps, layers, slots, batch, tokens, dim = (
        draw(st.integers(low, high)) for low, high in ((0, 10), (1, 4), (1, 8), (0, 3), (0, 9), (1, 70))
    )
    dtype = draw(st.sampled_from(TYPES[1:] if device == "cuda" else TYPES))
    snapshots = torch.randn(slots, layers, tokens, batch, dim).to(device, dtype).permute(1, 0, 3, 2, 4)
    weights = torch.randn((steps, layers, slots) if draw(st.booleans()) else (steps, slots), device=device)
    weights[torch.rand(weights.shape, device=device) < 0.3] = 0
    gates = None
    if draw(st.booleans()):
        gates = torch.randn(layers, steps, batch, 2 * dim).to(snapshots)[..., :dim].transpose(0, 1)
    operands = (snapshots, weights, gates)
    ours = haste_ext.taylor_extrapolate_steps(*operands)
    assert ours.dtype == dtype and ours.shape == (steps, batch, tokens, dim)
    exact = reference.taylor_extrapolate_steps(*map(double, operands))
    assert_as_accurate_as_eager(ours, reference.taylor_extrapolate_steps(*operands), exact, f"steps {dtype}")


def test_snapshots_without_layers_are_one_layer(device):
    snapshots, weights = torch.randn(4, 2, 9, 24, device=device), torch.randn(3, 4, device=device)
    gates = torch.randn(3, 1, 2, 24, device=device)
    ours = haste_ext.taylor_extrapolate_steps(snapshots, weights, gates)
    assert torch.equal(ours, haste_ext.taylor_extrapolate_steps(snapshots[None], weights[:, None], gates))
    for step in range(3):
        single = haste_ext.taylor_extrapolate(snapshots, weights[step], gate=gates[step, 0])
        torch.testing.assert_close(ours[step], single)


def test_no_layers_and_no_slots_add_nothing(device):
    weights = torch.ones(2, 0, device=device)
    for shape in ((3, 0, 2, 4, 8), (0, 0, 2, 4, 8)):
        assert (haste_ext.taylor_extrapolate_steps(torch.ones(shape, device=device), weights) == 0).all()


def test_one_module_is_one_layer_of_blocks():
    snapshots, weights = torch.randn(4, 2, 9, 24), torch.randn(4)
    residual, gate = torch.randn(2, 9, 24), torch.randn(2, 24)
    for r, g in ((None, None), (residual, None), (None, gate), (residual, gate)):
        ours = haste_ext.taylor_extrapolate(snapshots, weights, r, g)
        torch.testing.assert_close(ours, reference.taylor_extrapolate(snapshots, weights, r, g))
        blocks = haste_ext.taylor_extrapolate_blocks(snapshots[None], weights, None if g is None else g[None], r)
        assert torch.equal(ours, blocks)


def test_a_slot_of_weight_zero_is_not_read(device):
    snapshots = torch.randn(2, 3, 1, 5, 16, device=device)
    weights = torch.tensor([0.5, -1.5, 0.0], device=device)
    expected = haste_ext.taylor_extrapolate_blocks(snapshots[:, :2], weights[:2])
    snapshots[:, 2] = torch.nan
    assert torch.equal(haste_ext.taylor_extrapolate_blocks(snapshots, weights), expected)


def test_a_gradient_is_refused_when_it_is_asked_for():
    snapshots = torch.randn(2, 1, 3, 4, requires_grad=True)
    out = haste_ext.taylor_extrapolate(snapshots, torch.ones(2))
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()
    with pytest.raises(NotImplementedError, match="inference"):
        haste_ext.taylor_extrapolate_blocks(snapshots[None], torch.ones(2)).sum().backward()
    with pytest.raises(NotImplementedError, match="inference"):
        haste_ext.taylor_extrapolate_steps(snapshots, torch.ones(3, 2)).sum().backward()


def test_opcheck_and_compile(device):
    snapshots, weights = torch.randn(2, 3, 2, 5, 8, device=device), torch.randn(3, device=device)
    gates, residual = torch.randn(2, 2, 8, device=device), torch.randn(2, 5, 8, device=device).half()
    torch.library.opcheck(torch.ops.haste.taylor_extrapolate.default, (snapshots[0], weights, residual, gates[0]))
    torch.library.opcheck(torch.ops.haste.taylor_extrapolate_blocks.default, (snapshots, weights, gates, residual))
    of_steps = (snapshots, torch.randn(4, 3, device=device), torch.randn(4, 2, 2, 8, device=device))
    torch.library.opcheck(torch.ops.haste.taylor_extrapolate_steps.default, of_steps)
    torch._dynamo.reset()
    compiled = torch.compile(haste_ext.taylor_extrapolate_blocks, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        args = torch.randn(2, 3, 2, tokens, 8).to(device), weights, gates, torch.randn(2, tokens, 8).to(device)
        assert torch.equal(compiled(*args), haste_ext.taylor_extrapolate_blocks(*args))

    compiled = torch.compile(haste_ext.taylor_extrapolate_steps, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (4, 5):
        args = snapshots, torch.randn(steps, 3).to(device), torch.randn(steps, 2, 2, 8).to(device)
        assert torch.equal(compiled(*args), haste_ext.taylor_extrapolate_steps(*args))


SIZES_THAT_COINCIDE = {  # layers, slots, then the sizes of weights
    "one step": (2, 4, 1, 4),
    "as many steps as slots": (2, 3, 3, 3),
    "one step, weights per layer": (2, 3, 1, 2, 3),
    "as many steps as layers": (2, 3, 2, 2, 3),
    "all alike": (2, 2, 2, 2, 2),
}


@pytest.mark.parametrize("with_gates", [False, True])
@pytest.mark.parametrize("sizes", SIZES_THAT_COINCIDE.values(), ids=SIZES_THAT_COINCIDE)
def test_steps_compile_where_sizes_coincide(sizes, with_gates):
    layers, slots, *shape = sizes
    args = [torch.randn(layers, slots, 2, 5, 6), torch.randn(shape)]
    if with_gates:
        args.append(torch.randn(shape[0], layers, 2, 6))
    torch._dynamo.reset()
    compiled = torch.compile(haste_ext.taylor_extrapolate_steps, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(*args), haste_ext.taylor_extrapolate_steps(*args))


s4, w2 = torch.zeros(2, 3, 4, 8), torch.zeros(2)
REFUSED = {
    "not a tensor": (TypeError, "snapshots must", (None, w2), {}),
    "dimensions": (ValueError, "snapshots must", (s4[0], w2), {}),
    "weights' shape": (ValueError, "weights must", (s4, torch.zeros(3)), {}),
    "weights' type": (TypeError, "weights must", (s4, w2.double()), {}),
    "weights' device": (ValueError, "weights must", (s4, w2.to("meta")), {}),
    "residual": (ValueError, "residual must", (s4, w2), {"residual": s4[0, 0]}),
    "gate": (ValueError, "gate must", (s4, w2), {"gate": s4[0, 0, 0]}),
    "gate's type": (TypeError, "gate must", (s4, w2), {"gate": s4[0, :, 0].half()}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_argument_named(case):
    error, message, args, kwargs = REFUSED[case]
    with pytest.raises(error, match=message):
        haste_ext.taylor_extrapolate(*args, **kwargs)


s5, w43 = torch.zeros(2, 3, 3, 4, 8), torch.zeros(4, 3)
STEPS_REFUSED = {
    "dimensions": (ValueError, "snapshots must", (s5[0, 0], w43), {}),
    "weights' shape": (
        ValueError, "weights must", (s5, w43[:, :2]), {},
    ),
    "weights' layers": (ValueError, "weights must", (s5, w43.unsqueeze(1).expand(4, 3, 3)), {}),
    "weights' dimensions": (ValueError, "weights must", (s5, torch.tensor(1.0)), {}),
    "weights of one step": (ValueError, "weights must", (s5, w43[0]), {}),
    "weights' type": (TypeError, "weights must", (s5, w43.bfloat16()), {}),
    "weights' device": (ValueError, "weights must", (s5, w43.to("meta")), {}),
    "gates' steps": (
        ValueError, "gates must", (s5, w43),
        {"gates": torch.zeros(3, 2, 3, 8)},
    ),
    "gates of one step": (ValueError, "gates must", (s5, w43), {"gates": torch.zeros(2, 3, 8)}),
    "gates' type": (TypeError, "gates must", (s5, w43), {"gates": torch.zeros(4, 2, 3, 8).half()}),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS_REFUSED)
def test_bad_input_of_steps_is_refused_with_the_argument_named(case):
    error, message, args, kwargs = STEPS_REFUSED[case]
    with pytest.raises(error, match=message):
        haste_ext.taylor_extrapolate_steps(*args, **kwargs)


def test_the_compiled_side_checks_again():
    for weights in (torch.zeros(4, 2), torch.zeros(4, 3, 3), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="weights must"):
            torch.ops.haste.taylor_extrapolate_steps(s5, weights)
    with pytest.raises(RuntimeError, match="gates must"):
        torch.ops.haste.taylor_extrapolate_steps(s5, w43, torch.zeros(3, 2, 3, 8))
    with pytest.raises(RuntimeError, match="weights must"):
        torch.ops.haste.taylor_extrapolate(s4, torch.zeros(3))
