"""token_cosine_loss: −cosine between student and teacher features, token by token (the REPA loss)."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext._load import below_autograd
from haste_ext.ops.common import (
    below_autograd_in_backward,
    check_devices,
    check_reduction,
    check_same,
    check_tensor,
    grad_out_of_rows,
    implement_autograd,
    reduce,
    refusal_of,
    refuse_gradient,
    refuse_transforms,
)


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
        TypeError: an argument of another type than those above.
        ValueError: a shape, device or setting that does not fit; the sentence names the argument.
        RuntimeError: a CUDA tensor in a build without CUDA.
        NotImplementedError: under a transform of torch.func other than vmap, with a forward-mode tangent, or when
            differentiated twice.

    Source: REPA, arXiv 2410.06940, eq. 8 with cosine similarity; half-precision cosines made long runs NaN.
    """
    transformed = refuse_transforms(student=student, teacher=teacher)
    try:
        call = torch.ops.haste.token_cosine_loss.default if transformed else _with_gradient
        return call(student, teacher, reduction)
    except Exception as error:  # refused down there: said again in Python's terms, so that good calls pay for no check
        raise refusal_of(_check, (student, teacher, reduction), error) from None


def _check(student: Tensor, teacher: Tensor, reduction: str) -> None:
    check_tensor("student", student)
    check_tensor("teacher", teacher)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student must be (..., dim) with dim at least 1, got shape {tuple(student.shape)}")
    check_same("teacher", teacher, "student", student, "shape", "device")
    check_reduction(reduction)


class _TokenCosineLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, reduction):
        ctx.save_for_backward(student, teacher)
        ctx.rows, ctx.reduction = student.shape[:-1], reduction
        with below_autograd():
            return _without_gradient(student, teacher, reduction)

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher = ctx.saved_tensors  # not below autograd: activation checkpointing computes them here
        grad_out = grad_out_of_rows(grad_loss, ctx.rows, ctx.reduction)
        with below_autograd_in_backward():
            return torch.ops.haste.token_cosine_loss_backward.default(grad_out, student, teacher), None, None


def _with_gradient(student, teacher, reduction="mean"):
    if torch.is_grad_enabled() and student.requires_grad:
        return _TokenCosineLoss.apply(student, teacher, reduction)
    with below_autograd():
        return _without_gradient(student, teacher, reduction)


def _without_gradient(student, teacher, reduction="mean"):
    check_reduction(reduction)
    return reduce(torch.ops.haste.token_cosine_loss_forward.default(student, teacher), reduction)


implement_autograd("token_cosine_loss", _with_gradient)
torch.library.impl("haste::token_cosine_loss", "CompositeExplicitAutograd")(_without_gradient)


@torch.library.register_fake("haste::token_cosine_loss")
def _fake(student, teacher, reduction="mean"):
    return _without_gradient(student, teacher, reduction)


@torch.library.register_fake("haste::token_cosine_loss_forward")
def _fake_forward(student, teacher):
    _check(student, teacher, "none")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[:-1], dtype=dtype)


@torch.library.register_fake("haste::token_cosine_loss_backward")
def _fake_backward(grad_loss, student, teacher):
    check_devices(student=student, teacher=teacher, grad_loss=grad_loss)
    return student.new_empty(student.shape)


refuse_gradient("token_cosine_loss_forward", "it is a part of haste::token_cosine_loss, which has one")
refuse_gradient("token_cosine_loss_backward", "token_cosine_loss can be differentiated once only")
