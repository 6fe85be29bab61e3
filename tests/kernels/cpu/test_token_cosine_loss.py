"""token_cosine_loss on every instruction set, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

import haste_ext
from haste_ext import reference

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def value_and_gradient(loss, student, teacher):
    student = student.detach().requires_grad_()
    out = loss(student, teacher, reduction="none")
    return out.detach(), *torch.autograd.grad(out.sum(), student)


def vectors(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("dim", (2, 3, 5, 8, 15, 33, 64, 100, 771))
def test_values_and_gradients(isa, dtype, dim):
    student, teacher = vectors((3, 41, dim), dtype, 0), vectors((41, 3, dim), dtype, 1).transpose(0, 1)
    exact = value_and_gradient(reference.token_cosine_loss, student.double(), teacher.double())
    eager = value_and_gradient(reference.token_cosine_loss, student, teacher)
    ours = value_and_gradient(haste_ext.token_cosine_loss, student, teacher)
    for name, mine, theirs, ref in zip(("loss", "gradient"), ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(mine, theirs, ref, f"{name} {dtype}")


@pytest.mark.parametrize("student_type", (torch.float64, *FLOAT_TYPES))
@pytest.mark.parametrize("teacher_type", (torch.float64, *FLOAT_TYPES))
def test_student_and_teacher_of_any_types(isa, student_type, teacher_type):
    student, teacher = vectors((9, 37), student_type, 0), vectors((9, 37), teacher_type, 1)
    exact = value_and_gradient(reference.token_cosine_loss, student.double(), teacher.double())
    ours = value_and_gradient(haste_ext.token_cosine_loss, student, teacher)
    assert ours[0].dtype == (torch.float64 if student_type == torch.float64 else torch.float32)
    assert (ours[0] - exact[0]).abs().max() <= 2 * torch.finfo(ours[0].dtype).eps
    assert (ours[1] - exact[1]).abs().max() <= 2 * torch.finfo(student_type).eps * exact[1].abs().max()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (1e-30, 1e-10, 1e10, 1e30))
def test_vectors_whose_squares_leave_the_range_of_float(isa, dtype, size):
    student, teacher = vectors((9, 37), dtype, 0) * size, vectors((9, 37), dtype, 1) * 1e20
    exact = value_and_gradient(reference.token_cosine_loss, student.double(), teacher.double())
    loss, gradient = value_and_gradient(haste_ext.token_cosine_loss, student, teacher)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-7)
    atol = 2 * torch.finfo(dtype).eps * exact[1].abs().max().item()
    torch.testing.assert_close(gradient.double(), exact[1], rtol=0, atol=atol)


def test_bits_do_not_depend_on_the_threads(isa):
    student, teacher = vectors((2000, 77), torch.float32, 0), vectors((2000, 77), torch.float32, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(haste_ext.token_cosine_loss, student, teacher))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
