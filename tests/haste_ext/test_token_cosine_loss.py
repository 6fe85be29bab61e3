"""token_cosine_loss against its definition in float64, and as a torch operation among others."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import haste_ext
from haste_ext import reference

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def value_and_gradient(loss, student, teacher, grad_out=None, **kwargs):
    student = student.detach().clone().requires_grad_()
    out = loss(student, teacher, **kwargs)
    out.backward(torch.ones_like(out) if grad_out is None else grad_out.to(out.dtype))
    return out.detach(), student.grad


def check_against_definition(student, teacher, grad_out=None):
    """Token losses, and the gradient that `grad_out`, by default ones, gives."""
    kwargs = {"reduction": "none", "grad_out": grad_out}
    exact = value_and_gradient(reference.token_cosine_loss, student.double(), teacher.double(), **kwargs)
    eager = value_and_gradient(reference.token_cosine_loss, student, teacher, **kwargs)
    ours = value_and_gradient(haste_ext.token_cosine_loss, student, teacher, **kwargs)
    largest = (1 / student.double().norm(dim=-1).clamp_min(1e-12)).max().item() if student.numel() else 0.0
    for name, mine, theirs, ref in zip(("loss", "gradient"), ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(mine, theirs, ref, f"{name} {student.dtype}", 1.0 if name == "loss" else largest)


@pytest.mark.parametrize("student_type", TYPES)
@pytest.mark.parametrize("teacher_type", TYPES)
def test_values_and_gradients(student_type, teacher_type, device):
    if device == "cuda" and torch.float64 in (student_type, teacher_type):
        pytest.skip("float64 is for the CPU")
    student, teacher = (torch.randn(3, 17, 768).to(device, t) for t in (student_type, teacher_type))
    check_against_definition(student, teacher)


def test_patch_tokens_behind_a_class_token_are_read_where_they_lie(device):
    teacher = torch.randn(3, 18, 40, device=device)[:, 1:]
    student = torch.randn(17, 3, 40, device=device).transpose(0, 1)
    check_against_definition(student, teacher)
    check_against_definition(student, teacher, grad_out=torch.randn(17, 3, device=device).T)


def test_reductions():
    student, teacher = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    rows = haste_ext.token_cosine_loss(student, teacher, reduction="none")
    assert torch.equal(haste_ext.token_cosine_loss(student, teacher), rows.mean())
    assert torch.equal(haste_ext.token_cosine_loss(student, teacher, reduction="sum"), rows.sum())


def test_gradients_exactly_by_gradcheck():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5).double()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda s, how=reduction: haste_ext.token_cosine_loss(s, teacher, how), (student,)
        )


def test_zero_vectors_follow_normalize():
    """The norm is clamped at 1e-12: a zero student has loss 0 and the gradient −teacher/‖teacher‖/1e-12."""
    student, teacher = torch.zeros(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    ours, exact = (
        value_and_gradient(f, student, teacher, reduction="sum")
        for f in (haste_ext.token_cosine_loss, reference.token_cosine_loss)
    )
    torch.testing.assert_close(ours, exact)
    loss, gradient = value_and_gradient(haste_ext.token_cosine_loss, teacher, student)
    assert loss.item() == 0 and not gradient.any()


def test_large_half_precision_values_do_not_overflow(device):
    student = torch.full((4, 768), 6e4, dtype=torch.float16, device=device)
    loss, gradient = value_and_gradient(haste_ext.token_cosine_loss, student, student)
    assert abs(loss.item() + 1) < 1e-5 and torch.isfinite(gradient).all()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
    order=st.permutations(range(4)),
)
def test_any_shape_and_layout(device, shape, dim, dtype, order):
    dtype = torch.float32 if device == "cuda" and dtype == torch.float64 else dtype
    shape = [*shape, dim]
    order = [i for i in order if i < len(shape)]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    student = torch.randn([shape[i] for i in order]).to(device, dtype).permute(inverse)
    check_against_definition(student, torch.randn(shape).to(device, dtype))


def test_nothing_flows_to_the_teacher_and_double_backward_is_refused():
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(haste_ext.token_cosine_loss(student, teacher), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()
    haste_ext.token_cosine_loss(student, teacher).backward()
    assert teacher.grad is None


def test_opcheck_and_compile(device):
    student, teacher = torch.randn(2, 5, 8, device=device, requires_grad=True), torch.randn(2, 5, 8, device=device)
    torch.library.opcheck(torch.ops.haste.token_cosine_loss.default, (student, teacher, "mean"))
    torch.library.opcheck(torch.ops.haste.token_cosine_loss_forward.default, (student.detach(), teacher))
    torch.library.opcheck(
        torch.ops.haste.token_cosine_loss_backward.default, (torch.ones(2, 5, device=device), student.detach(), teacher)
    )
    torch._dynamo.reset()
    compiled = torch.compile(haste_ext.token_cosine_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        student, teacher = (torch.randn(2, tokens, 8, device=device) for _ in range(2))
        ours, eager = (value_and_gradient(f, student, teacher) for f in (compiled, haste_ext.token_cosine_loss))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


REFUSED = {
    "not a tensor": (TypeError, "student must", (1.0, torch.zeros(3))),
    "integers": (TypeError, "teacher must", (torch.zeros(3), torch.zeros(3).long())),
    "shapes": (
        ValueError,
        "teacher must",
        (torch.zeros(3), torch.zeros(4)),
    ),
    "scalar": (ValueError, "student must", (torch.tensor(1.0), torch.tensor(1.0))),
    "no dimension": (ValueError, "dim at least 1", (torch.zeros(2, 0), torch.zeros(2, 0))),
    "device": (ValueError, "teacher must", (torch.zeros(3), torch.zeros(3, device="meta"))),
    "no integers": (TypeError, "teacher must", (torch.zeros(0, 3), torch.zeros(0, 3).long())),
    "reduction": (ValueError, "reduction must", (torch.zeros(3), torch.zeros(3), "max")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_argument_named(case):
    error, message, args = REFUSED[case]
    with pytest.raises(error, match=message):
        haste_ext.token_cosine_loss(*args)


def test_the_compiled_side_checks_again():
    with pytest.raises(RuntimeError, match="teacher must"):
        torch.ops.haste.token_cosine_loss_forward(torch.zeros(3), torch.zeros(4))
