"""−cosine per token as REPA writes it, in the type of its input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from haste_ext.ops._autograd import reduce


def token_cosine_loss(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """−Σ_d normalize(student)_d · normalize(teacher)_d, then the reduction; see haste_ext.token_cosine_loss."""
    rows = -(F.normalize(student, dim=-1) * F.normalize(teacher.detach().to(student.dtype), dim=-1)).sum(-1)
    return reduce(rows, reduction)
