"""Every way of writing an operation computes that operation, gradients included: the comparison is of equals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from haste.caching.forecaster import Forecaster, Timestep

from haste_ext.bench import baselines
from haste_ext.bench.compare import bound
from haste_ext.bench.operations import OPERATIONS, Case, Contender, Operation

TINY = {
    "attn_align_loss": {"heads": 3, "student_dim": 72, "teacher_dim": 64},
    "token_cosine_loss": {"feature_dim": 48},
    "taylor_extrapolate": {"width": 40, "order": 4},
    "taylor_extrapolate_blocks": {"width": 40, "order": 3, "layers": 5},
    "taylor_extrapolate_steps": {"width": 40, "order": 3, "layers": 5, "steps": 2},
}
EACH = [(op, contender) for op in OPERATIONS.values() for contender in op.contenders]
NAMES = [f"{op.name}-{contender.name}" for op, contender in EACH]


def tiny(op: Operation, dtype: torch.dtype, device: str) -> Case:
    return op.case(2, 37, dtype, device, **TINY[op.name])


def results_and_exact(op: Operation, contender: Contender, case: Case, near: bool = False):
    """Output and gradients by the contender (as it is before torch.compile) and by the definition in float64."""
    if why := contender.missing(case):
        pytest.skip(why)
    inputs = case.inputs(near)
    definition = Contender("definition", op.reference)
    exact = bound(op, definition, op.reference, [x.double() for x in inputs], forward_only=False)()
    return bound(op, contender, contender.function, inputs, forward_only=False)(), exact


@pytest.mark.parametrize(("op", "contender"), EACH, ids=NAMES)
def test_in_float64_it_is_the_definition(op, contender):
    results, exact = results_and_exact(op, contender, tiny(op, torch.float64, "cpu"))
    assert len(results) == len(op.results)
    for result, reference in zip(results, exact, strict=True):
        atol = 1e-6 if op.name.startswith("taylor") else 1e-12  # a forecast's weights are float32 by definition
        torch.testing.assert_close(result, reference, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("op", "contender"), EACH, ids=NAMES)
def test_in_a_working_type_it_comes_near(op, contender, dtype, device):
    results, exact = results_and_exact(op, contender, tiny(op, dtype, device))
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    for result, reference in zip(results, exact, strict=True):
        assert (result.double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize(("student_dim", "teacher_dim"), ((64, 64), (24, 40), (72, 20), (17, 9)))
def test_the_flash_composition_pads_head_dims(student_dim, teacher_dim):
    op = OPERATIONS["attn_align_loss"]
    flash = next(contender for contender in op.contenders if contender.name == "flash composition")
    case = replace(tiny(op, torch.float64, "cpu"), student_dim=student_dim, teacher_dim=teacher_dim)
    for result, reference in zip(*results_and_exact(op, flash, case), strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-12)


def test_what_is_verified_fits_into_memory():
    attention = OPERATIONS["attn_align_loss"].case(8, 1024, torch.float32, "cpu", 12, 72, 64)
    map_bytes = 6 * 8 * 1024**2
    reduced = [attention.reduced_to(count * map_bytes) for count in (1000, 25, 12, 5, 0)]
    assert [(case.batch, case.heads) for case in reduced] == [(8, 12), (2, 12), (1, 12), (1, 5), (1, 1)]


def test_near_convergence_the_gradient_is_small():
    """The student's logits are its teacher's but for a hundredth, whatever the head dims."""
    op = OPERATIONS["attn_align_loss"]
    case = tiny(op, torch.float64, "cpu")
    far, near = (results_and_exact(op, op.contenders[-1], case, near)[1] for near in (False, True))
    assert near[1].abs().max() < 0.05 * far[1].abs().max()


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize(("interval", "ahead"), [(baselines.INTERVAL, baselines.AHEAD), (6, 5)])
def test_the_weights_are_those_of_the_forecaster(order, interval, ahead):
    full_steps = [interval * count for count in reversed(range(order + 1))]
    taken = [Timestep(step, math.nan) for step in full_steps]
    expected = Forecaster("taylor", order).weights(taken, Timestep(full_steps[0] + ahead, math.nan))
    assert baselines.taylor_weights(order, ahead, interval) == pytest.approx(expected)


def test_the_least_work_is_that_of_the_design():
    """Microseconds at 4.3 TB/s, 790 TFLOP/s and 3.9 T exp/s for 65,536 tokens in bfloat16, counted by hand."""
    attention = OPERATIONS["attn_align_loss"].case(256, 256, torch.bfloat16, "cpu", 12, 72, 64)
    cosine = OPERATIONS["token_cosine_loss"].case(256, 256, torch.bfloat16, "cpu", 768)
    for case, expected in ((attention, ((69, 103, 99), (143, 103, 152))), (cosine, ((0, 0, 47), (0, 0, 70)))):
        for phase, (matmul, exp, memory) in zip(case.phases(), expected, strict=True):
            assert 1e6 * phase.matmul_flops / 790e12 == pytest.approx(matmul, abs=0.6)
            assert 1e6 * phase.exps / 3.9e12 == pytest.approx(exp, abs=0.6)
            assert 1e6 * phase.bytes / 4.3e12 == pytest.approx(memory, abs=1.3)  # without the losses


def test_the_least_work_of_a_forecast_reads_every_snapshot_once():
    module = OPERATIONS["taylor_extrapolate"].case(2, 16, torch.float32, "cpu", 32, 4).phases()[0]
    network = OPERATIONS["taylor_extrapolate_blocks"].case(2, 16, torch.float32, "cpu", 32, 4, 3).phases()[0]
    steps = OPERATIONS["taylor_extrapolate_steps"].case(2, 16, torch.float32, "cpu", 32, 4, 3, 6).phases()[0]
    tensor, gate, weights = 4 * 2 * 16 * 32, 4 * 2 * 32, 4 * 5
    assert module.bytes == 7 * tensor + gate + weights
    assert network.bytes == (3 * 5 + 2) * tensor + 3 * gate + weights
    assert steps.bytes == (3 * 5 + 6) * tensor + 6 * (3 * gate + weights)
