"""The other ways of writing the operations: eager code as published, its best form, compositions of torch's kernels.

The functions of an operation take its operands in their order; `prepare_...` makes of them what a way keeps at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, factorial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

import haste_ext
from haste_ext import _load

# token_cosine_loss


def cosine_by_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """As REPA writes it: a Python loop over the batch."""
    loss = 0.0
    for z, z_teacher in zip(student, teacher, strict=True):
        cosines = (F.normalize(z, dim=-1) * F.normalize(z_teacher, dim=-1)).sum(-1)
        loss = loss + (-cosines).mean()
    return loss / len(student)


def cosine_vectorised(student: Tensor, teacher: Tensor) -> Tensor:
    return -(F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1).mean()


# attn_align_loss


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * q.shape[-1] ** -0.5


def attention_log_of_softmax(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """As HASTE writes it: both maps by softmax, then the logarithm of one, which underflows."""
    student = attention_logits(student_q, student_k).softmax(-1)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k).softmax(-1)
    return -(teacher * student.log()).sum(-1).mean()


def attention_log_softmax(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """The same with the logarithm taken where it is safe: the best eager form."""
    student = attention_logits(student_q, student_k).log_softmax(-1)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k).softmax(-1)
    return -(teacher * student).sum(-1).mean()


# The attention loss put together from flash attention that torch already has: the best there is without a kernel.
#
# Per query row, with s and t the logits of student and teacher,
#
#     loss = logsumexp(s) − Σ_j softmax(t)_j s_j = lse_s − scale · q_s·O_t,    O_t = softmax(t) k_s,
#
# so the teacher's attention over the *student's keys as values* gives the sum, and the student's over its own keys
# gives lse_s and O_s = softmax(s) k_s. Then
#
#     dq_s = scale · (O_s − O_t),    dk_s = scale · (softmax(s)ᵀ − softmax(t)ᵀ) q_s,
#
# and softmaxᵀ·x is what a flash backward returns for the values when x is the gradient of its output. No map is
# written, but each map's logits are computed twice, and O_s − O_t is a difference of two rounded numbers: near
# convergence, where they agree, little of it is left in half precision.


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
            output, logsumexp, *state, _ = _load.flash_attention(q, k, v, scale=scale)
            return Attention(q, k, v, scale, output, logsumexp, tuple(state))
        output, logsumexp = _load.flash_attention_cpu(q, k, v, scale=scale)
        return Attention(q, k, v, scale, output, logsumexp)

    def transposed_times(self, x: Tensor) -> Tensor:
        """softmax(q·kᵀ·scale)ᵀ·x: the gradient of v where x is that of the output."""
        operands = (x, self.q, self.k, self.v, self.output, self.logsumexp)
        if self.q.is_cuda:
            bounds, dropout = self.cuda_state[:4], self.cuda_state[4:]
            return _load.flash_attention_backward(*operands, *bounds, 0.0, False, *dropout, scale=self.scale)[2]
        return _load.flash_attention_cpu_backward(*operands, 0.0, False, scale=self.scale)[2]


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


# TaylorSeer's forecast (arXiv 2503.06923) two ways: by its finite differences, and by the weights they amount to.
#
# At a full step s, with d the distance to the full step before it, T_0 = F(s) and T_{i+1} = (T_i − T_i,old) / d for
# i < order; x steps later F̂ = Σ_i T_i · x^i / i!. With full steps an interval apart, T_i is the i-th backward
# difference over interval^i, so F̂ is a weighted sum of the last order + 1 snapshots.

INTERVAL = 4  # steps from one full step to the next
AHEAD = 2  # steps from the last full step to the forecast


def taylor_weights(order: int, ahead: int = AHEAD, interval: int = INTERVAL) -> list[float]:
    """The weight of each snapshot, newest first."""
    return [
        sum(
            (ahead / interval) ** i / factorial(i) * (-1) ** slot * comb(i, slot)  # of snapshot `slot` in T_i·x^i/i!
            for i in range(slot, order + 1)
        )
        for slot in range(order + 1)
    ]


def taylor_differences(snapshots: Tensor, interval: int = INTERVAL) -> dict[int, Tensor]:
    """T_0 … T_order from the snapshots (order + 1, ...), newest first, as a cache of finite differences keeps them."""
    cache: dict[int, Tensor] = {}
    for feature in reversed(snapshots.unbind()):
        cache = _updated(cache, feature, len(snapshots) - 1, interval)
    return cache


def _updated(cache: dict[int, Tensor], feature: Tensor, order: int, interval: int) -> dict[int, Tensor]:
    """What a full step does to the cache."""
    new = {0: feature}
    for i in range(order):
        if i not in cache:
            break
        new[i + 1] = (new[i] - cache[i]) / interval
    return new


def taylor_forecast(cache: dict[int, Tensor], ahead: int = AHEAD) -> Tensor:
    """Σ_i T_i · x^i / i! as published, term by term."""
    total = torch.zeros_like(cache[0])
    for i, term in cache.items():
        total = total + (1 / factorial(i)) * term * ahead**i
    return total


# taylor_extrapolate


def prepare_of_module(snapshots: Tensor, weights: Tensor, residual: Tensor, gate: Tensor) -> tuple:
    return taylor_differences(snapshots), residual, gate


def recurrence_of_module(differences: dict[int, Tensor], residual: Tensor, gate: Tensor) -> Tensor:
    """As TaylorSeer writes it."""
    return residual + gate.unsqueeze(1) * taylor_forecast(differences)


def weighted_sum_of_module(snapshots: Tensor, weights: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    forecast = sum(weight * snapshot for weight, snapshot in zip(weights, snapshots, strict=True))
    return residual + gate.unsqueeze(1) * forecast


# taylor_extrapolate_blocks


def prepare_of_blocks(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> tuple:
    return [taylor_differences(layer) for layer in snapshots], gates, residual


def recurrence_of_blocks(differences: list[dict[int, Tensor]], gates: Tensor, residual: Tensor) -> Tensor:
    """As TaylorSeer writes it, module by module."""
    for cache, gate in zip(differences, gates, strict=True):
        residual = recurrence_of_module(cache, residual, gate)
    return residual


def weighted_sum_of_blocks(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> Tensor:
    for layer, gate in zip(snapshots, gates, strict=True):
        residual = weighted_sum_of_module(layer, weights, residual, gate)
    return residual


def one_reduction(snapshots: Tensor, weights: Tensor, gates: Tensor, residual: Tensor) -> Tensor:
    """The weighted sum as torch.compile likes it: one reduction, one kernel.

    Unrolled over the modules it takes over a minute to compile for SiT-XL/2 and runs slower than this.
    """
    terms = gates[:, None, :, None] * weights.view(-1, 1, 1, 1) * snapshots
    return (residual + terms.sum((0, 1))).to(residual.dtype)


# taylor_extrapolate_steps


def prepare_of_steps(snapshots: Tensor, weights: Tensor, gates: Tensor) -> tuple:
    return [taylor_differences(layer, interval=len(weights) + 1) for layer in snapshots], gates


def recurrence_of_steps(differences: list[dict[int, Tensor]], gates: Tensor) -> Tensor:
    """As TaylorSeer writes it, step by step and module by module."""
    steps = []
    for ahead, of_step in enumerate(gates, start=1):
        total = torch.zeros_like(differences[0][0])
        for cache, gate in zip(differences, of_step, strict=True):
            total = total + gate.unsqueeze(1) * taylor_forecast(cache, ahead)
        steps.append(total)
    return torch.stack(steps)


def reductions_of_steps(snapshots: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
    """One reduction per step, as torch.compile likes it: it may read the snapshots once for all of them."""
    zero = torch.zeros_like(snapshots[0, 0])
    return torch.stack(
        [one_reduction(snapshots, w, g, zero) for w, g in zip(weights.unbind(), gates.unbind(), strict=True)]
    )


def call_by_call_of_steps(snapshots: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
    """taylor_extrapolate_blocks for one step after the other."""
    calls = zip(weights.unbind(), gates.unbind(), strict=True)
    return torch.stack([haste_ext.taylor_extrapolate_blocks(snapshots, w, g) for w, g in calls])
