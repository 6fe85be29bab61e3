"""attn_align_loss: distil a teacher's attention maps into a student's without ever writing a map."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext._load import below_autograd
from haste_ext.ops.common import (
    below_autograd_in_backward,
    check_choice,
    check_devices,
    check_int,
    check_reduction,
    check_same,
    check_scale,
    check_tensor,
    grad_out_of_rows,
    implement_autograd,
    reduce,
    refusal_of,
    refuse_gradient,
    refuse_transforms,
)

MAX_CUDA_HEAD_DIM = 128
LAYOUT = "(batch, heads, tokens, dim)"
DIVERGENCES = ("cross_entropy", "kl")


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
    divergence: str = "cross_entropy",
    causal: int = 0,
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
        divergence: "cross_entropy", or "kl": less the teacher's entropy, KL(teacher ‖ student). The gradient is the
            same; a student that has converged reads 0.
        causal: b > 0 lets a query see the keys of its own block of b tokens and of earlier blocks, in both maps:
            1 is the ordinary causal mask, xAR's cells are blocks of 64. 0: every key.

    Returns:
        float32 (float64 for a float64 student): a scalar, or (B, H, N) for "none". The first H = min(H_s, H_t)
        heads are aligned; the others get zero gradient.

    Infinities: where the definition in float64 has no finite number for a row, the row is NaN, and so are its
        gradients: that of an infinite query, and those of an infinite key unless the row's logit of it is −∞. On the
        CPU whatever row reads an infinite number is NaN. Tokens of a prefix and heads that take no part are not read.
        Finite operands give finite rows: logits beyond 1e38 count as that. (On CUDA a sum of products that overflows
        to both sides is NaN, as in eager float32.)

    Raises:
        TypeError: an argument of another type than those above.
        ValueError: a shape, device or setting that does not fit; the sentence names the argument.
        RuntimeError: a CUDA tensor in a build without CUDA.
        NotImplementedError: under a transform of torch.func other than vmap, with a forward-mode tangent, or when
            differentiated twice.

    Source: HASTE, arXiv 2505.16792, the attention alignment loss.
    """
    transformed = refuse_transforms(student_q=student_q, student_k=student_k, teacher_q=teacher_q, teacher_k=teacher_k)
    arguments = (
        student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix,
        reduction, divergence, causal,
    )  # fmt: skip
    if not _are_plain(arguments):
        _check(*arguments)
    try:
        return torch.ops.haste.attn_align_loss.default(*arguments) if transformed else _with_gradient(*arguments)
    except Exception as error:  # refused down there: said again in Python's terms, so that good calls pay for no check
        raise refusal_of(_check, arguments, error) from None


def _are_plain(arguments) -> bool:
    """Whether the numbers are Python's own: torch would take a bool, or a tensor that waits for a gradient, for one."""
    scales, prefixes = arguments[4:6], arguments[6:8]
    return all(type(x) in (float, int, type(None)) for x in scales) and all(
        type(x) is int for x in (*prefixes, arguments[10])
    )


def _check(
    student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix,
    reduction, divergence, causal,
):  # fmt: skip
    for side, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        check_tensor(f"{side}_q", q, 4, LAYOUT)
        check_tensor(f"{side}_k", k, 4, LAYOUT)
        check_same(f"{side}_k", k, f"{side}_q", q, "shape", "dtype", "device")
        if q.shape[3] < 1:
            raise ValueError(f"{side}_q must have a last dimension of at least 1, got shape {tuple(q.shape)}")
        if q.is_cuda and q.shape[3] > MAX_CUDA_HEAD_DIM:
            raise ValueError(f"{side}_q must have a head dim of at most {MAX_CUDA_HEAD_DIM} on CUDA, got {q.shape[3]}")
    check_same("teacher_q", teacher_q, "student_q", student_q, "device")
    if teacher_q.shape[0] != student_q.shape[0]:
        raise ValueError(
            f"teacher_q must have the batch size of student_q, {student_q.shape[0]}, got {teacher_q.shape[0]}"
        )
    check_scale("student_scale", student_scale)
    check_scale("teacher_scale", teacher_scale)
    check_int("student_prefix", student_prefix, 0, student_q.shape[2], "the tokens of student_q")
    check_int("teacher_prefix", teacher_prefix, 0, teacher_q.shape[2], "the tokens of teacher_q")
    student_tokens, teacher_tokens = student_q.shape[2] - student_prefix, teacher_q.shape[2] - teacher_prefix
    if student_tokens != teacher_tokens:
        raise ValueError(
            f"teacher_q must have as many tokens after its prefix of {teacher_prefix} as student_q after its own, "
            f"{student_tokens}, got {teacher_tokens}"
        )
    check_reduction(reduction)
    check_choice("divergence", divergence, DIVERGENCES)
    check_int("causal", causal, 0, 2**63 - 1, "the largest int64")


def _rows(
    student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix,
    reduction, divergence, causal,
):  # fmt: skip
    """The row losses, and per row {maximum, 1 / Σ e^{logit − maximum}} of either map, which backward needs."""
    check_reduction(reduction)
    check_choice("divergence", divergence, DIVERGENCES)
    operands = _of_one_type(student_q, student_k, teacher_q, teacher_k)
    return torch.ops.haste.attn_align_loss_forward.default(
        *operands, student_scale, teacher_scale, student_prefix, teacher_prefix, divergence == "kl", causal
    )


def _of_one_type(*operands: Tensor) -> tuple[Tensor, ...]:
    """On CUDA the kernels take all operands in one type."""
    if operands[0].is_cuda and operands[0].dtype != operands[2].dtype:
        return tuple(x.float() for x in operands)
    return operands


class _AttnAlignLoss(torch.autograd.Function):
    """One node of the graph for rows and reduction."""

    @staticmethod
    def forward(ctx, *arguments):
        with below_autograd():
            rows, *softmax = _rows(*arguments)
            loss = reduce(rows, arguments[8])
        ctx.save_for_backward(*arguments[:4], *softmax)
        ctx.settings, ctx.causal = arguments[4:8], arguments[10]
        ctx.rows, ctx.reduction = rows.shape, arguments[8]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        need_q, need_k, *_ = ctx.needs_input_grad
        # Not below autograd: activation checkpointing computes them here.
        student_q, student_k, teacher_q, teacher_k, *softmax = ctx.saved_tensors
        grad_out = grad_out_of_rows(grad_loss, ctx.rows, ctx.reduction)
        operands = _of_one_type(student_q, student_k, teacher_q, teacher_k)
        with below_autograd_in_backward():
            grad_q, grad_k = torch.ops.haste.attn_align_loss_backward.default(
                grad_out, *operands, *softmax, *ctx.settings, need_q, need_k, ctx.causal
            )
        if operands[0] is not student_q:
            grad_q, grad_k = grad_q.to(student_q.dtype), grad_k.to(student_q.dtype)
        return grad_q if need_q else None, grad_k if need_k else None, *(None,) * 9


DEFAULTS = (None, None, 0, 0, "mean", "cross_entropy", 0)  # what torch leaves out of the arguments it passes on


def _with_gradient(*arguments):
    arguments += DEFAULTS[len(arguments) - 4 :]
    if torch.is_grad_enabled() and (arguments[0].requires_grad or arguments[1].requires_grad):
        return _AttnAlignLoss.apply(*arguments)
    with below_autograd():
        return _without_gradient(*arguments)


def _without_gradient(*arguments):
    arguments += DEFAULTS[len(arguments) - 4 :]
    return reduce(_rows(*arguments)[0], arguments[8])


implement_autograd("attn_align_loss", _with_gradient)
torch.library.impl("haste::attn_align_loss", "CompositeExplicitAutograd")(_without_gradient)


@torch.library.register_fake("haste::attn_align_loss")
def _fake(*arguments):
    return _without_gradient(*arguments)


@torch.library.register_fake("haste::attn_align_loss_forward")
def _fake_forward(
    student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix, teacher_prefix,
    kl=False, causal=0,
):  # fmt: skip
    settings = (student_scale, teacher_scale, student_prefix, teacher_prefix, "none", DIVERGENCES[kl], causal)
    _check(student_q, student_k, teacher_q, teacher_k, *settings)
    batch, student_heads, tokens, _ = student_q.shape
    rows = (batch, min(student_heads, teacher_q.shape[1]), tokens - student_prefix)
    dtype = torch.float64 if student_q.dtype == torch.float64 else torch.float32
    return tuple(student_q.new_empty(shape, dtype=dtype) for shape in (rows, (*rows, 2), (*rows, 2)))


@torch.library.register_fake("haste::attn_align_loss_backward")
def _fake_backward(
    grad_loss, student_q, student_k, teacher_q, teacher_k, student_softmax, teacher_softmax,
    student_scale, teacher_scale, student_prefix, teacher_prefix, need_q, need_k, causal=0,
):  # fmt: skip
    check_devices(
        student_q=student_q, student_k=student_k, teacher_q=teacher_q, teacher_k=teacher_k,
        grad_loss=grad_loss, student_softmax=student_softmax, teacher_softmax=teacher_softmax,
    )  # fmt: skip
    return (
        _empty_gradient(student_q) if need_q else student_q.new_empty((0,)),
        _empty_gradient(student_k) if need_k else student_k.new_empty((0,)),
    )


def _empty_gradient(student: Tensor) -> Tensor:
    """As empty_gradient in csrc/ops/attn_align_loss.cpp: memory of its own, the last stride 1, the other dimensions in
    the order of the student's strides, or of the copy that is worked on where its last stride is not 1."""
    as_it_lies = student.shape[-1] <= 1 or student.stride(-1) == 1
    order = sorted(range(3), key=lambda i: -student.stride(i)) if as_it_lies else [0, 1, 2]
    gradient = student.new_empty([*(student.shape[i] for i in order), student.shape[3]])
    return gradient.permute(*(order.index(i) for i in range(3)), 3)


refuse_gradient("attn_align_loss_forward", "it is a part of haste::attn_align_loss, which has one")
refuse_gradient("attn_align_loss_backward", "attn_align_loss can be differentiated once only")
