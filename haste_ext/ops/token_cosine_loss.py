"""token_cosine_loss: −cosine between student and teacher features, token by token (the REPA loss)."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext.ops._checks import check_reduction, check_same, check_tensor, reduce, refuse_gradient


def token_cosine_loss(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """−cos(student, teacher) over the last dimension, in float32 inside whatever the input type.

    Args:
        student: (..., D), float32, float16, bfloat16 (float64 on the CPU); any strides.
        teacher: the same shape and device; its type may differ. No gradient reaches it.
        reduction: "mean" over all tokens, "sum", or "none".

    Returns:
        float32 (float64 for a float64 student): a scalar, or (...) for "none". Norms are clamped from below at
        1e-12, as torch.nn.functional.normalize does, so a zero vector gives loss 0.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.

    Source: REPA, arXiv 2410.06940, eq. 8 with cosine similarity; half-precision cosines made long runs NaN.
    """
    _check(student, teacher)
    check_reduction(reduction)
    return reduce(torch.ops.haste.token_cosine_loss_forward(student, teacher), reduction)


# torch.ops.haste.token_cosine_loss is this very function: rows by a kernel, the reduction and its gradient by torch.
torch.library.impl("haste::token_cosine_loss", "CompositeImplicitAutograd")(token_cosine_loss)


def _check(student: Tensor, teacher: Tensor) -> None:
    check_tensor("student", student)
    check_tensor("teacher", teacher)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student has shape {tuple(student.shape)}; it must be (..., dim) with dim at least 1")
    check_same("teacher", teacher, "student", student, "shape", "device")


@torch.library.register_fake("haste::token_cosine_loss_forward")
def _fake_forward(student, teacher):
    _check(student, teacher)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[:-1], dtype=dtype)


@torch.library.register_fake("haste::token_cosine_loss_backward")
def _fake_backward(grad_loss, student, teacher):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_loss):
    if not ctx.needs_input_grad[0]:
        return None, None
    return torch.ops.haste.token_cosine_loss_backward(grad_loss, *ctx.saved_tensors), None


torch.library.register_autograd("haste::token_cosine_loss_forward", _backward, setup_context=_setup_context)
refuse_gradient("haste::token_cosine_loss_backward", "token_cosine_loss can be differentiated once only")
