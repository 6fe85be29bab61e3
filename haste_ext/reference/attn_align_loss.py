"""H(teacher, student) of two attention maps as one writes it down, maps and all, in the type of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext.ops._checks import reduce


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
    """Σ_j −softmax(t)_j · log_softmax(s)_j per query row, then the reduction; see haste_ext.attn_align_loss."""
    heads = min(student_q.shape[1], teacher_q.shape[1])
    student = attention_logits(student_q, student_k, student_scale, student_prefix, heads)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k, teacher_scale, teacher_prefix, heads).softmax(-1)
    rows = -(teacher.to(student.dtype) * student.log_softmax(-1)).sum(-1)
    return reduce(rows, reduction)


def attention_logits(q: Tensor, k: Tensor, scale: float | None, prefix: int, heads: int) -> Tensor:
    """q·kᵀ·scale of the first `heads` heads without the prefix tokens: (B, heads, N, N)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q[:, :heads, prefix:] @ k[:, :heads, prefix:].mT) * scale
