"""The divergence of two attention maps as one writes it down, maps and all, in the type of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext.ops._autograd import reduce


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
