"""The attention loss put together from flash attention that torch already has: the best there is without a kernel.

Per query row, with s and t the logits of student and teacher,

    loss = logsumexp(s) − Σ_j softmax(t)_j s_j = lse_s − scale · q_s·O_t,    O_t = softmax(t) k_s,

so the teacher's attention over the *student's keys as values* gives the sum, and the student's over its own keys gives
lse_s and O_s = softmax(s) k_s. Then

    dq_s = scale · (O_s − O_t),    dk_s = scale · (softmax(s)ᵀ − softmax(t)ᵀ) q_s,

and softmaxᵀ·x is what a flash backward returns for the values when x is the gradient of its output. No map is written,
but each map's logits are computed twice, and O_s − O_t is a difference of two rounded numbers: near convergence, where
they agree, little of it is left in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from haste_ext.bench.operation import Case

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """softmax(q·kᵀ·scale)·v by torch's flash kernel of that device; all heads must have one dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    output: Tensor
    logsumexp: Tensor
    cuda_state: tuple = ()  # what the CUDA backward wants to have back: sequence bounds and the state of dropout

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Attention:
        if q.is_cuda:
            output, logsumexp, *state, _ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
            return Attention(q, k, v, scale, output, logsumexp, tuple(state))
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return Attention(q, k, v, scale, output, logsumexp)

    def transposed_times(self, x: Tensor) -> Tensor:
        """softmax(q·kᵀ·scale)ᵀ·x: the gradient of v where x is that of the output."""
        operands = (x, self.q, self.k, self.v, self.output, self.logsumexp)
        if self.q.is_cuda:
            bounds, dropout = self.cuda_state[:4], self.cuda_state[4:]
            return aten._scaled_dot_product_flash_attention_backward(
                *operands, *bounds, 0.0, False, *dropout, scale=self.scale
            )[2]
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*operands, 0.0, False, scale=self.scale)[2]


class FlashComposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_q, student_k, teacher_q, teacher_k):
        scale, dim = student_q.shape[-1] ** -0.5, padded_dim(student_q, teacher_q)
        q, k, tq, tk = (padded(x, dim) for x in (student_q, student_k, teacher_q, teacher_k))
        ctx.dim = student_q.shape[-1]
        ctx.student = Attention.of(q, k, k, scale)
        ctx.teacher = Attention.of(tq, tk, k, teacher_q.shape[-1] ** -0.5)
        logsumexp = ctx.student.logsumexp  # float32 for half-precision operands
        picked = (q.to(logsumexp.dtype) * ctx.teacher.output).sum(-1)  # Σ_j softmax(t)_j s_j, but for the scale
        return (logsumexp - scale * picked).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher = ctx.student, ctx.teacher
        factor = grad_loss * (student.scale / student.logsumexp.numel())
        grad_q = factor * (student.output - teacher.output)
        grad_k = factor * (student.transposed_times(student.q) - teacher.transposed_times(student.q))
        return grad_q[..., : ctx.dim], grad_k[..., : ctx.dim], None, None


def flash_composition(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    return FlashComposition.apply(student_q, student_k, teacher_q, teacher_k)


def padded_dim(student_q: Tensor, teacher_q: Tensor) -> int:
    """Flash attention wants one head dim for queries, keys and values; on CUDA a multiple of 8."""
    dim = max(student_q.shape[-1], teacher_q.shape[-1])
    return -(-dim // 8) * 8 if student_q.is_cuda else dim


def padded(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def missing_flash(case: Case) -> str | None:
    if case.device == "cuda" and case.dtype not in (torch.float16, torch.bfloat16):
        return "torch's flash attention on CUDA takes float16 and bfloat16 only"
    return None
