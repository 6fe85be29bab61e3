"""token_cosine_loss beside REPA's loop over samples and the vectorised eager form."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import haste_ext
from haste_ext import reference
from haste_ext.bench.operation import Case, Contender, Operation, Phase


@dataclass(frozen=True)
class FeatureCase(Case):
    """Projected student tokens against the teacher's, of its width: 768 for DINOv2-B."""

    feature_dim: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        student, teacher = (self.randn(self.batch, self.tokens, self.feature_dim, seed=seed) for seed in (0, 1))
        return [teacher + 0.01 * student if near else student, teacher]

    def phases(self) -> list[Phase]:
        rows = self.batch * self.tokens
        values = rows * self.feature_dim
        return [
            Phase(2 * values * self.element_size + 4 * rows, other_flops=6 * values),  # three dot products
            Phase(3 * values * self.element_size + 4 * rows, other_flops=9 * values),  # again, and two terms summed
        ]

    def float64_bytes_per_sample(self) -> int:
        return 6 * 8 * self.tokens * self.feature_dim


def eager_by_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """As REPA writes it: a Python loop over the batch."""
    loss = 0.0
    for z, z_teacher in zip(student, teacher, strict=True):
        cosines = (F.normalize(z, dim=-1) * F.normalize(z_teacher, dim=-1)).sum(-1)
        loss = loss + (-cosines).mean()
    return loss / len(student)


def eager_vectorised(student: Tensor, teacher: Tensor) -> Tensor:
    return -(F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1).mean()


OPERATION = Operation(
    name="token_cosine_loss",
    case=FeatureCase,
    reference=reference.token_cosine_loss,
    contenders=(
        Contender("eager, by sample", eager_by_sample),
        Contender("eager, vectorised", eager_vectorised),
        Contender("torch.compile", eager_vectorised, compiled=True),
        Contender("haste", haste_ext.token_cosine_loss),
    ),
    baseline="eager, vectorised",
    results=("loss", "gradient"),
    default_batch=64,
    cases_near_convergence=True,
    bandwidth_bound=True,
)
