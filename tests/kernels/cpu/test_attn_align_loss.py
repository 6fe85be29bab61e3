"""attn_align_loss on every instruction set and on emulated AMX tiles, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

import haste_ext
from haste_ext import _C, reference

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(batch, heads, tokens, dims, types, seed=0):
    """Student q, k as views of a packed projection behind two prefix tokens; teacher q, k contiguous."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens + 2, 3, heads, dims[0], generator=generator).to(types[0])
    teacher = torch.randn(2, batch, heads, tokens, dims[1], generator=generator).to(types[1])
    return [*packed.permute(2, 0, 3, 1, 4)[:2, :, :, 2:], *teacher]


def value_and_gradients(loss, tensors, **kwargs):
    q, k = (x.detach().requires_grad_() for x in tensors[:2])
    out = loss(q, k, *tensors[2:], **kwargs)
    return out.detach(), *torch.autograd.grad(out.sum(), (q, k))


def check_against_definition(attn_align_loss, tensors, **kwargs):
    exact = value_and_gradients(reference.attn_align_loss, [t.double() for t in tensors], **kwargs)
    eager = value_and_gradients(reference.attn_align_loss, tensors, **kwargs)
    ours = value_and_gradients(attn_align_loss, tensors, **kwargs)
    for name, mine, theirs, ref in zip(("loss", "dq", "dk"), ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(mine, theirs, ref, f"{name} {tensors[0].dtype}")


# Tokens around the blocks of the kernels (6, 16, 32, 64, 96, 256 and 512), dims around the vectors (4, 8, 16, 32).
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    ("tokens", "dims"),
    ((2, (1, 1)), (17, (3, 130)), (31, (16, 8)), (65, (33, 31)), (97, (72, 64)), (255, (72, 64)), (529, (40, 48))),
)
def test_values_and_gradients(attn_align_loss, dtype, tokens, dims):
    check_against_definition(attn_align_loss, operands(2, 2, tokens, dims, (dtype, dtype)), reduction="none")


# Blocks around those of the kernels and longer than all tokens; 1 is the ordinary causal mask, 64 a cell of xAR.
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("tokens", "causal"), ((2, 1), (97, 1), (255, 64), (131, 7), (300, 100), (64, 65), (1100, 40)))
@pytest.mark.parametrize("divergence", ("cross_entropy", "kl"))
def test_a_causal_mask_by_blocks(attn_align_loss, dtype, tokens, causal, divergence):
    tensors = operands(1, 2, tokens, (40, 48), (dtype, dtype))
    check_against_definition(attn_align_loss, tensors, reduction="none", causal=causal, divergence=divergence)


def test_a_query_knows_nothing_of_keys_that_it_does_not_see(attn_align_loss):
    """Whatever finite numbers they hold (here within what the bf16 kernels take): not a bit of its loss and gradient
    changes, nor do they get a gradient from it.
    """
    for dtype in (torch.float64, *FLOAT_TYPES):
        tensors = operands(1, 2, 70, (40, 24), (dtype, dtype))
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, :, 48:] = torch.tensor([30, -30, 1e-4]).repeat_interleave(8)[:22, None]
        settings = {"reduction": "none", "causal": 16}
        (loss, dq, _), (other_loss, other_dq, _) = (
            value_and_gradients(attn_align_loss, x, **settings) for x in (tensors, changed)
        )
        assert torch.equal(loss[..., :48], other_loss[..., :48]) and torch.equal(dq[..., :48, :], other_dq[..., :48, :])
        q, k = (x.detach().requires_grad_() for x in tensors[:2])
        (dk,) = torch.autograd.grad(attn_align_loss(q, k, *tensors[2:], **settings)[..., :48].sum(), k)
        assert not dk[..., 48:, :].any() and dk[..., :48, :].any()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_student_that_has_converged_reads_zero(attn_align_loss, dtype):
    tensors = operands(2, 2, 97, (64, 64), (dtype, dtype))
    tensors[2:] = [x.clone() for x in tensors[:2]]
    rows = attn_align_loss(*tensors, reduction="none", divergence="kl")
    assert not rows.any()
    entropies = attn_align_loss(*tensors, reduction="none")
    student = [x * (1 + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))) for x in tensors[:2]]
    tensors[:2] = [x.to(dtype) for x in student]
    near = attn_align_loss(*tensors, reduction="none", divergence="kl")
    exact = reference.attn_align_loss(*(x.double() for x in tensors), reduction="none", divergence="kl")
    assert (near - exact).abs().max() < (1e-5 if dtype == torch.bfloat16 else 1e-6)  # bf16's powers are shorter
    assert entropies.min() > 2


def test_one_token_has_loss_and_gradients_of_exactly_zero(attn_align_loss):
    for dtype in (torch.float64, *FLOAT_TYPES):
        for result in value_and_gradients(attn_align_loss, operands(2, 3, 1, (72, 64), (dtype, dtype))):
            assert not result.any()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_near_convergence(attn_align_loss, dtype):
    """The student within 1 % of its teacher: the gradient is a small difference of two maps."""
    teacher = torch.randn(2, 2, 2, 100, 64, generator=torch.Generator().manual_seed(1))
    student = teacher + 0.01 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(2))
    check_against_definition(attn_align_loss, [*student.to(dtype), *teacher.to(dtype)])


@pytest.mark.parametrize("student_type", (torch.float64, *FLOAT_TYPES))
@pytest.mark.parametrize("teacher_type", (torch.float64, *FLOAT_TYPES))
def test_student_and_teacher_of_any_types(attn_align_loss, student_type, teacher_type):
    tensors = operands(1, 2, 70, (40, 24), (student_type, teacher_type))
    exact = value_and_gradients(reference.attn_align_loss, [t.double() for t in tensors])
    ours = value_and_gradients(attn_align_loss, tensors)
    assert ours[0].dtype == (torch.float64 if student_type == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6}.get(student_type, 2 * torch.finfo(student_type).eps)
    for mine, ref in zip(ours, exact, strict=True):
        assert (mine - ref).abs().max() <= tolerance * ref.abs().max()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-9, 0.8))
def test_any_scale(attn_align_loss, dtype, scale):
    tensors = operands(1, 2, 33, (24, 24), (dtype, dtype))
    check_against_definition(attn_align_loss, tensors, student_scale=scale, teacher_scale=0.2, reduction="none")


@pytest.mark.parametrize("exponent", (5, 13, 15, 40, 62, 90, 127))
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_logits_of_any_size_give_no_nan(attn_align_loss, dtype, exponent):
    """Up to the largest powers of two of the type, where the products of two operands overflow float.

    All sums of such operands are exact, so that rows with a tie for the largest logit can be compared too.
    """
    size = 2.0 ** min(exponent, 15 if dtype == torch.float16 else 127)
    tensors = [(x.sign() * size).to(dtype) for x in operands(1, 2, 40, (16, 16), (torch.float64,) * 2)]
    loss, dq, dk = value_and_gradients(attn_align_loss, tensors, reduction="none")
    assert not loss.isnan().any() and not dq.isnan().any() and not dk.isnan().any()
    exact = reference.attn_align_loss(*(t.double() for t in tensors), reduction="none")
    if exponent < 62:  # larger logits are held to 1e38
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_row_that_is_not_a_number_stays_alone(attn_align_loss, dtype):
    tensors = operands(1, 1, 70, (16, 16), (dtype, dtype))
    clean = attn_align_loss(*tensors, reduction="none")
    for bad in (float("nan"), float("inf")):
        spoiled = [x.clone() for x in tensors]
        spoiled[0][0, 0, 5, 3] = bad
        loss = attn_align_loss(*spoiled, reduction="none")
        others = torch.arange(70) != 5
        torch.testing.assert_close(loss[..., others], clean[..., others])
        assert loss[..., 5].isnan().all()
    spoiled[1][0, 0, 7] = float("nan")
    assert value_and_gradients(attn_align_loss, spoiled)[0].isnan()


@pytest.mark.parametrize("dtype", (torch.float64, *FLOAT_TYPES))
@pytest.mark.parametrize(
    "settings", ({}, {"divergence": "kl"}, {"causal": 1}, {"causal": 16, "divergence": "kl"}), ids=str
)
@pytest.mark.parametrize("operand", range(4), ids=("student_q", "student_k", "teacher_q", "teacher_k"))
def test_what_reads_an_infinite_operand_is_not_a_number(attn_align_loss, operand, settings, dtype):
    """Though the products of an infinite key may be −∞, whose power is 0. Other rows stay what they were."""
    tensors = operands(1, 2, 70, (40, 24), (dtype, dtype))
    clean = attn_align_loss(*tensors, reduction="none", **settings)
    block = settings.get("causal", 70)
    for token, value in ((0, torch.inf), (33, -torch.inf), (69, torch.inf)):
        spoiled = [x.clone() for x in tensors]
        spoiled[operand][0, 1, token, 5] = value
        queries = torch.arange(70)
        reads = queries == token if operand % 2 == 0 else queries // block >= token // block
        loss, dq, dk = value_and_gradients(attn_align_loss, spoiled, reduction="none", **settings)
        assert loss[0, 1, reads].isnan().all()
        torch.testing.assert_close(loss[0, 1, ~reads], clean[0, 1, ~reads])  # bf16's kernel leaves them to another
        assert torch.equal(loss[0, 0], clean[0, 0])
        assert dq[0, 1, reads].isnan().all() and dk[0, 1, :1].isnan().all()
        assert dq[0, 0].isfinite().all() and dk[0, 0].isfinite().all()
        assert attn_align_loss(*spoiled, **settings).isnan()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_beside_an_infinite_query_large_ones_stay_finite(attn_align_loss, dtype):
    """Whose products overflow float where the operands are not divided first."""
    tensors = [(x.sign() * 2.0**90).to(dtype) for x in operands(1, 1, 40, (16, 16), (torch.float64,) * 2)]
    clean = attn_align_loss(*tensors, reduction="none")
    for operand in (0, 2):
        spoiled = [x.clone() for x in tensors]
        spoiled[operand][0, 0, 7, 3] = torch.inf
        loss = attn_align_loss(*spoiled, reduction="none")
        others = torch.arange(40) != 7
        assert loss[..., 7].isnan().all()
        torch.testing.assert_close(loss[..., others], clean[..., others])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((2, 3, 70), (1, 1, 1100)))
def test_bits_do_not_depend_on_the_threads(attn_align_loss, dtype, shape):
    """Nor on whether dq and dk come from one pass or, where one head must keep several threads busy, from two."""
    tensors = operands(*shape, (40, 24), (dtype, dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(attn_align_loss, tensors, reduction="none"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_backward_takes_what_the_forward_of_another_isa_left():
    isas = _C.cpu_capabilities()
    tensors = operands(1, 2, 60, (32, 32), (torch.bfloat16,) * 2)
    exact = value_and_gradients(reference.attn_align_loss, [t.double() for t in tensors])
    for forward, backward in ((isas[0], isas[-1]), (isas[-1], isas[0])):
        q, k = (x.detach().requires_grad_() for x in tensors[:2])
        _C.force_cpu_capability(forward)
        loss = haste_ext.attn_align_loss(q, k, *tensors[2:])
        _C.force_cpu_capability(backward)
        grads = torch.autograd.grad(loss, (q, k))
        _C.force_cpu_capability("")
        for grad, ref in zip(grads, exact[1:], strict=True):
            assert (grad - ref).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * ref.abs().max()


def test_the_bits_are_those_of_the_isa(attn_align_loss):
    """Guards against one that is named but not taken, by the order in which it sums."""
    tensors = operands(1, 2, 97, (72, 64), (torch.bfloat16,) * 2)
    ours = attn_align_loss(*tensors, reduction="none")
    in_force = haste_ext.build_info()["cpu_capability"]
    _C.force_cpu_capability("portable")
    portable = haste_ext.attn_align_loss(*tensors, reduction="none")
    assert torch.equal(ours, portable) == (attn_align_loss is haste_ext.attn_align_loss and in_force == "portable")


def test_emulated_tiles_give_the_bits_of_the_processors(emulated):
    if "amx" not in _C.cpu_capabilities():
        pytest.skip("this processor has no AMX to compare its emulation with")
    tensors = operands(2, 2, 97, (72, 64), (torch.bfloat16,) * 2)
    _C.force_cpu_capability("amx")
    ours = value_and_gradients(haste_ext.attn_align_loss, tensors, reduction="none")
    _C.force_cpu_capability("")
    for emulation, processor in zip(value_and_gradients(emulated, tensors, reduction="none"), ours, strict=True):
        assert torch.equal(emulation, processor)
