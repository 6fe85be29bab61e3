"""token_cosine_loss on CUDA, emulated: against the definition in float64, in every pair of types."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

from haste_ext import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(emulator, student, teacher, grad_out, seed=0):
    """Loss rows and the student's gradient, of (outer, inner, dim) operands."""
    outer, inner, dim = student.shape
    values = {"outer": outer, "inner": inner, "dim": dim}
    values |= {"student_type": student.dtype, "teacher_type": teacher.dtype}
    operands = {"student": student, "teacher": teacher}
    loss = torch.full((outer, inner), float("nan"))
    loss = emulator("token_cosine_loss_forward", operands | {"loss": loss}, ("loss",), seed, **values)["loss"]
    gradient = torch.full(student.shape, float("nan"), dtype=student.dtype)
    buffers = operands | {"grad_out": grad_out, "gradient": gradient}
    gradient = emulator("token_cosine_loss_backward", buffers, ("gradient",), seed, **values)["gradient"]
    return loss, gradient


def definition(student, teacher, grad_out):
    student = student.detach().clone().requires_grad_()
    rows = reference.token_cosine_loss(student, teacher, reduction="none")
    rows.backward(grad_out.to(rows.dtype))
    return rows.detach(), student.grad


def check(emulator, student, teacher, grad_out):
    working = torch.promote_types(student.dtype, teacher.dtype)
    exact = definition(student.double(), teacher.double(), grad_out)
    eager = definition(student.to(working), teacher.to(working), grad_out)
    results = run(emulator, student, teacher, grad_out)
    for name, ours, theirs, ref in zip(("loss", "dz"), results, eager, exact, strict=True):
        # A gradient may cancel to nothing, in one dimension say: its terms are g/‖z‖.
        terms = 1.0 if name == "loss" else (grad_out.abs().max() / student.double().norm(dim=-1).min()).item()
        what = f"emulated {name}, {student.dtype} and {teacher.dtype}"
        assert_as_accurate_as_eager(ours, theirs, ref, what, terms)


def operands(types, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for dtype in types]


@pytest.mark.parametrize("student_type", TYPES)
@pytest.mark.parametrize("teacher_type", TYPES)
def test_every_pair_of_types(emulator, student_type, teacher_type):
    grad_out = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    check(emulator, *operands((student_type, teacher_type), (2, 9, 264)), grad_out)


@pytest.mark.parametrize("dim", (1, 7, 8, 72, 768, 1001))
def test_any_dim(emulator, dim):
    grad_out = torch.tensor(0.25).expand(1, 3)
    check(emulator, *operands((torch.bfloat16, torch.float32), (1, 3, dim)), grad_out)


@pytest.mark.parametrize("student_type", TYPES)
def test_operands_where_they_lie(emulator, student_type):
    """A class token skipped, rows of odd stride, and one element off the 16-byte boundary."""
    student, teacher = operands((student_type, torch.bfloat16), (3, 6, 25))
    grad_out = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).mT
    check(emulator, student[:, 1:, :24], teacher[:, 1:, 1:], grad_out)


def test_vectors_of_no_length(emulator):
    """The norm is clamped at 1e-12, as torch.nn.functional.normalize does: no NaN, and no second term."""
    student, teacher = operands((torch.float32, torch.float32), (1, 4, 16))
    student[0, 0] = 0
    teacher[0, 1] = 0
    student[0, 2] *= 1e-14
    grad_out = torch.ones(1, 4)
    loss, gradient = run(emulator, student, teacher, grad_out)
    exact_loss, exact_gradient = definition(student.double(), teacher.double(), grad_out)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student_type", TYPES)
@pytest.mark.parametrize("teacher_type", TYPES)
def test_the_largest_values_of_a_type(emulator, student_type, teacher_type):
    """Squares and norms beyond float on either side or both, beside a token of ordinary values."""
    largest = [torch.finfo(dtype).max for dtype in (student_type, teacher_type)]
    student, teacher = (
        (x / x.abs().max() * torch.tensor([size, size, 1.0]).reshape(3, 1)).to(dtype)
        for x, size, dtype in zip(
            operands((torch.float64,) * 2, (1, 3, 72)), largest, (student_type, teacher_type), strict=True
        )
    )
    teacher[0, 1] = torch.arange(72)
    grad_out = torch.ones(1, 3)
    loss, gradient = run(emulator, student, teacher, grad_out)
    exact_loss, exact_gradient = definition(student.double(), teacher.double(), grad_out)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=0, atol=1e-6)
    for token in range(3):
        value = exact_gradient[0, token]
        allowed = max(4 * torch.finfo(student_type).eps * value.abs().max().item(), torch.finfo(student_type).tiny)
        torch.testing.assert_close(gradient[0, token].double(), value, rtol=0, atol=allowed)


@pytest.mark.parametrize("value", (torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", TYPES)
def test_an_infinite_operand_shows(emulator, dtype, value):
    """As NaN in its token's loss and gradient, though it be beside numbers whose squares are beyond float, or zeros."""
    for spoiled in (0, 1):
        tensors = operands((dtype, dtype), (1, 4, 72))
        tensors[spoiled][0, 1] *= torch.finfo(dtype).max / 8
        tensors[1 - spoiled][0, 2] = 0
        tensors[spoiled][0, 1:, 5] = value
        loss, gradient = run(emulator, *tensors, torch.ones(1, 4))
        assert loss[0, 1:].isnan().all() and loss[0, 0].isfinite()
        definition_of = definition(*(x.double() for x in tensors), torch.ones(1, 4))[1]
        assert gradient[~definition_of.isfinite()].isnan().all() and gradient[0, 0].isfinite().all()


def test_nothing_to_do(emulator):
    student, teacher = operands((torch.float32, torch.float32), (0, 4, 16))
    assert run(emulator, student, teacher, torch.zeros(0, 4))[0].shape == (0, 4)


def test_refuses_float64(emulator):
    with pytest.raises(emulator.Refused, match="not float64"):
        run(emulator, *operands((torch.float64, torch.float32), (1, 1, 8)), torch.zeros(1, 1))
