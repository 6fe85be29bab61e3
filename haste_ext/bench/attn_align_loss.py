"""attn_align_loss beside the ways in which attention maps are distilled today."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

import haste_ext
from haste_ext import reference
from haste_ext.bench.flash_composition import flash_composition, missing_flash
from haste_ext.bench.operation import Case, Contender, Operation, Phase


@dataclass(frozen=True)
class AttentionCase(Case):
    """The aligned heads of one layer, as in HASTE on SiT-XL/2 with DINOv2-B: 12 heads of 72 against 12 of 64."""

    heads: int
    student_dim: int
    teacher_dim: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """q, k of student and teacher as views of packed (B, N, 3, H, D) projections."""
        student, teacher = (
            self.randn(self.batch, self.tokens, 3, self.heads, dim, seed=seed)
            for seed, dim in enumerate((self.student_dim, self.teacher_dim))
        )
        if near:
            student = self.as_teacher(teacher) + 0.01 * student
        return [view for packed in (student, teacher) for view in packed.permute(2, 0, 3, 1, 4)[:2]]

    def as_teacher(self, teacher: Tensor) -> Tensor:
        """The teacher in the student's head dim: the same logits q·kᵀ/√D if that is no smaller."""
        same = pad(teacher[..., : self.student_dim], (0, max(0, self.student_dim - self.teacher_dim)))
        return same * (self.student_dim / self.teacher_dim) ** 0.25

    def phases(self) -> list[Phase]:
        rows = self.batch * self.heads * self.tokens
        student, teacher = rows * self.student_dim, rows * self.teacher_dim
        operands = 2 * (student + teacher) * self.element_size
        logits = 2 * self.tokens * (student + teacher)
        gradients = 4 * self.tokens * student
        exps = 2 * rows * self.tokens  # one for each entry of either map
        return [
            Phase(operands + 4 * rows, matmul_flops=logits, exps=exps),
            Phase(operands + 2 * student * self.element_size, matmul_flops=logits + gradients, exps=exps),
        ]

    def float64_bytes_per_sample(self) -> int:
        return 6 * 8 * self.heads * self.tokens**2  # the maps

    def reduced_to(self, float64_bytes: int) -> AttentionCase:
        """Fewer heads too where one sample's maps are too many."""
        heads = float64_bytes // (self.float64_bytes_per_sample() // self.heads)
        return replace(super().reduced_to(float64_bytes), heads=max(1, min(self.heads, heads)))


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * q.shape[-1] ** -0.5


def eager_log_of_softmax(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """As HASTE writes it: both maps by softmax, then the logarithm of one, which underflows."""
    student = attention_logits(student_q, student_k).softmax(-1)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k).softmax(-1)
    return -(teacher * student.log()).sum(-1).mean()


def eager_log_softmax(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """The same with the logarithm taken where it is safe: the best eager form."""
    student = attention_logits(student_q, student_k).log_softmax(-1)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k).softmax(-1)
    return -(teacher * student).sum(-1).mean()


OPERATION = Operation(
    name="attn_align_loss",
    case=AttentionCase,
    reference=reference.attn_align_loss,
    contenders=(
        Contender("eager, log(softmax)", eager_log_of_softmax),
        Contender("eager, log_softmax", eager_log_softmax),
        Contender("torch.compile", eager_log_softmax, compiled=True),
        Contender("flash composition", flash_composition, missing=missing_flash),
        Contender("haste", haste_ext.attn_align_loss),
    ),
    baseline="eager, log_softmax",
    results=("loss", "dq", "dk"),
    default_batch=8,
    cases_near_convergence=True,
)
