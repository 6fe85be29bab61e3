"""The definitions in plain torch, slow and obvious: tests and benchmarks hold the kernels against them.

Give them float64 tensors for the reference values, or the working type for what eager code gets. Arguments and results
are those of the operations of the same name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from haste_ext.ops.common import reduce

__all__ = [
    "attn_align_loss",
    "taylor_extrapolate",
    "taylor_extrapolate_blocks",
    "taylor_extrapolate_steps",
    "token_cosine_loss",
]


def token_cosine_loss(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """−Σ_d normalize(student)_d · normalize(teacher)_d, then the reduction; see haste_ext.token_cosine_loss."""
    rows = -(F.normalize(student, dim=-1) * F.normalize(teacher.detach().to(student.dtype), dim=-1)).sum(-1)
    return reduce(rows, reduction)


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
    """Per query row, over the keys that it sees, Σ_j −softmax(t)_j · log_softmax(s)_j, or for "kl"
    Σ_j softmax(t)_j · (log_softmax(t)_j − log_softmax(s)_j); then the reduction. See haste_ext.attn_align_loss.
    """
    heads = min(student_q.shape[1], teacher_q.shape[1])
    student = attention_logits(student_q, student_k, student_scale, student_prefix, heads)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k, teacher_scale, teacher_prefix, heads)
    hidden = hidden_keys(student.shape[-1], causal, student.device)
    teacher = teacher.masked_fill(hidden, -torch.inf)
    terms = -student.masked_fill(hidden, -torch.inf).log_softmax(-1)
    if divergence == "kl":
        terms = terms + teacher.log_softmax(-1).to(student.dtype)
    rows = teacher.softmax(-1).to(student.dtype) * terms.masked_fill(hidden, 0)
    return reduce(rows.sum(-1), reduction)


def hidden_keys(tokens: int, causal: int, device: torch.device) -> Tensor:
    """(N, N): which keys (columns) a query (row) does not see; causal b: those of later blocks of b tokens."""
    block = torch.arange(tokens, device=device) // (causal if causal > 0 else max(tokens, 1))
    return block[None, :] > block[:, None]


def attention_logits(q: Tensor, k: Tensor, scale: float | None, prefix: int, heads: int) -> Tensor:
    """q·kᵀ·scale of the first `heads` heads without the prefix tokens: (B, heads, N, N)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q[:, :heads, prefix:] @ k[:, :heads, prefix:].mT) * scale


def taylor_extrapolate(
    snapshots: Tensor, weights: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """residual + gate ⊙ Σ_k weights_k · snapshot_k; see haste_ext.taylor_extrapolate."""
    gates = None if gate is None else gate.unsqueeze(0)
    return taylor_extrapolate_blocks(snapshots.unsqueeze(0), weights, gates, residual)


def taylor_extrapolate_blocks(
    snapshots: Tensor, weights: Tensor, gates: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """residual + Σ_l gates_l ⊙ Σ_k weights_{l,k} · snapshot_{l,k}; see haste_ext.taylor_extrapolate_blocks."""
    layers, slots, *shape = snapshots.shape
    weights = weights.expand(layers, slots)
    out_type = snapshots.dtype if residual is None else residual.dtype
    out = snapshots.new_zeros(shape, dtype=out_type) if residual is None else residual
    for layer in range(layers):
        forecast = snapshots.new_zeros(shape)
        for slot in range(slots):
            if weights[layer, slot] != 0:  # an unused slot is not read: it may hold NaN
                forecast = forecast + weights[layer, slot].to(snapshots.dtype) * snapshots[layer, slot]
        if gates is not None:
            forecast = gates[layer].unsqueeze(1) * forecast
        out = out + forecast.to(out_type)
    return out


def taylor_extrapolate_steps(snapshots: Tensor, weights: Tensor, gates: Tensor | None = None) -> Tensor:
    """Σ_l gates_{s,l} ⊙ Σ_k weights_{s,l,k} · snapshot_{l,k} for every s; see haste_ext.taylor_extrapolate_steps."""
    if snapshots.dim() == 4:
        snapshots = snapshots.unsqueeze(0)
    steps = [
        taylor_extrapolate_blocks(snapshots, of_step, None if gates is None else gates[step])
        for step, of_step in enumerate(weights)
    ]
    return torch.stack(steps) if steps else snapshots.new_empty((0, *snapshots.shape[2:]))
