"""attn_align_loss: distil a teacher's attention maps into a student's without ever writing a map."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext.ops._checks import (
    check_int,
    check_reduction,
    check_same,
    check_scale,
    check_tensor,
    reduce,
    refuse_gradient,
)

MAX_CUDA_HEAD_DIM = 128
LAYOUT = "(batch, heads, tokens, dim)"


def attn_align_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_prefix: int = 0,
    teacher_prefix: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy H(teacher, student) of two attention maps over their keys, the HASTE loss L_A.

    With s = student_q·student_kᵀ·student_scale and t likewise for the teacher, per query row
    ``loss = logsumexp(s) − Σ_j softmax(t)_j · s_j``, computed tile by tile: memory is linear in the tokens.

    Args:
        student_q, student_k: (B, H_s, N_s, D_s), float32, float16, bfloat16 (float64 on the CPU). Any strides:
            views of a packed qkv projection are read where they lie; only a last stride other than 1 is copied.
        teacher_q, teacher_k: (B, H_t, N_t, D_t) on the same device; type, head dim and strides may differ from
            the student's (on CUDA unequal types are both converted to float32). No gradient reaches them.
        student_scale, teacher_scale: factor on the logits, ``D ** -0.5`` if None.
        student_prefix, teacher_prefix: leading tokens (class, register, text) left out as queries and as keys;
            what remains, N, must be equally long on both sides.
        reduction: "mean" over batch × heads × queries, "sum", or "none".

    Returns:
        float32 (float64 for a float64 student): a scalar, or (B, H, N) for "none". The first H = min(H_s, H_t)
        heads are aligned; the others get zero gradient.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.

    Source: HASTE, arXiv 2505.16792, the attention alignment loss.
    """
    _check(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix)
    check_reduction(reduction)
    if student_q.is_cuda and student_q.dtype != teacher_q.dtype:
        student_q, student_k, teacher_q, teacher_k = (x.float() for x in (student_q, student_k, teacher_q, teacher_k))
    rows, _, _ = torch.ops.haste.attn_align_loss_forward(
        student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix
    )
    return reduce(rows, reduction)


# torch.ops.haste.attn_align_loss is this very function: rows by a kernel, the reduction and its gradient by torch.
torch.library.impl("haste::attn_align_loss", "CompositeImplicitAutograd")(attn_align_loss)


def _check(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix):
    for side, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        check_tensor(f"{side}_q", q, 4, LAYOUT)
        check_tensor(f"{side}_k", k, 4, LAYOUT)
        check_same(f"{side}_k", k, f"{side}_q", q, "shape", "dtype", "device")
        if q.shape[3] < 1:
            raise ValueError(f"{side}_q has shape {tuple(q.shape)}; its last dimension must be at least 1")
        if q.is_cuda and q.shape[3] > MAX_CUDA_HEAD_DIM:
            raise ValueError(f"{side}_q has head dim {q.shape[3]}; on CUDA it must be at most {MAX_CUDA_HEAD_DIM}")
    check_same("teacher_q", teacher_q, "student_q", student_q, "device")
    if teacher_q.shape[0] != student_q.shape[0]:
        raise ValueError(
            f"teacher_q has batch size {teacher_q.shape[0]}; it must be that of student_q, {student_q.shape[0]}"
        )
    check_scale("student_scale", student_scale)
    check_scale("teacher_scale", teacher_scale)
    check_int("student_prefix", student_prefix, 0, student_q.shape[2], "the tokens of student_q")
    check_int("teacher_prefix", teacher_prefix, 0, teacher_q.shape[2], "the tokens of teacher_q")
    student_tokens, teacher_tokens = student_q.shape[2] - student_prefix, teacher_q.shape[2] - teacher_prefix
    if student_tokens != teacher_tokens:
        raise ValueError(
            f"teacher_q has {teacher_tokens} tokens after its prefix of {teacher_prefix}; "
            f"it must have as many as student_q after its own, {student_tokens}"
        )


def _row_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


@torch.library.register_fake("haste::attn_align_loss_forward")
def _fake_forward(
    student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix
):
    _check(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix)
    batch, student_heads, tokens, _ = student_q.shape
    rows = (batch, min(student_heads, teacher_q.shape[1]), tokens - student_prefix)
    return tuple(student_q.new_empty(shape, dtype=_row_dtype(student_q)) for shape in (rows, (*rows, 2), (*rows, 2)))


@torch.library.register_fake("haste::attn_align_loss_backward")
def _fake_backward(
    grad_loss, student_q, student_k, teacher_q, teacher_k, student_softmax, teacher_softmax,
    student_scale, teacher_scale, student_prefix, teacher_prefix, need_q, need_k,
):  # fmt: skip
    return (
        _empty_gradient(student_q) if need_q else student_q.new_empty((0,)),
        _empty_gradient(student_k) if need_k else student_k.new_empty((0,)),
    )


def _empty_gradient(student: Tensor) -> Tensor:
    """Laid out as the student is, but for a last stride other than 1, where the operation works on a copy."""
    unit_stride = student.shape[-1] <= 1 or student.stride(-1) == 1
    return torch.empty_like(student if unit_stride else student.contiguous())


def _setup_context(ctx, inputs, output):
    *tensors, ctx.student_scale, ctx.teacher_scale, ctx.student_prefix, ctx.teacher_prefix = inputs
    _, student_softmax, teacher_softmax = output
    ctx.mark_non_differentiable(student_softmax, teacher_softmax)
    ctx.save_for_backward(*tensors, student_softmax, teacher_softmax)


def _backward(ctx, grad_loss, _grad_student_softmax, _grad_teacher_softmax):
    need_q, need_k = ctx.needs_input_grad[:2]
    if not (need_q or need_k):
        return (None,) * 8
    grad_q, grad_k = torch.ops.haste.attn_align_loss_backward(
        grad_loss, *ctx.saved_tensors,
        ctx.student_scale, ctx.teacher_scale, ctx.student_prefix, ctx.teacher_prefix, need_q, need_k,
    )  # fmt: skip
    return grad_q if need_q else None, grad_k if need_k else None, None, None, None, None, None, None


torch.library.register_autograd("haste::attn_align_loss_forward", _backward, setup_context=_setup_context)
refuse_gradient("haste::attn_align_loss_backward", "attn_align_loss can be differentiated once only")
