"""attn_align_loss, forward and backward, beside the ways in which it is written today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference
from haste_ext.reference.attn_align_loss import attention_logits


@dataclass(frozen=True)
class Case:
    """One shape: 12 of the student's heads against the teacher's 12, as in HASTE on SiT-XL/2 and DINOv2-B."""

    batch: int
    heads: int
    tokens: int
    student_dim: int
    teacher_dim: int
    dtype: torch.dtype
    device: str

    def operands(self) -> list[Tensor]:
        """q, k of student and teacher as views of packed (B, N, 3, H, D) projections."""
        generator = torch.Generator().manual_seed(0)
        views = []
        for dim in (self.student_dim, self.teacher_dim):
            packed = torch.randn(self.batch, self.tokens, 3, self.heads, dim, generator=generator).to(
                self.device, self.dtype
            )
            views += packed.permute(2, 0, 3, 1, 4)[:2]
        return views


def eager_as_haste(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """Both maps materialised by softmax, then the logarithm of one: underflows where log_softmax does not."""
    student = attention_logits(student_q, student_k, None, 0, student_q.shape[1]).softmax(-1)
    with torch.no_grad():
        teacher = attention_logits(teacher_q, teacher_k, None, 0, teacher_q.shape[1]).softmax(-1)
    return -(teacher * student.log()).sum(-1).mean()


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "eager, log(softmax)": eager_as_haste,
    "eager, log_softmax": reference.attn_align_loss,
    "haste": haste_ext.attn_align_loss,
}
BASELINE = "eager, log_softmax"


def forward_backward(loss: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the loss and its gradients with respect to the student's q and k."""
    q, k = (x.detach().requires_grad_() for x in operands[:2])

    def call() -> tuple[Tensor, ...]:
        out = loss(q, k, *operands[2:])
        return out.detach(), *torch.autograd.grad(out, (q, k))

    return call


def verify(case: Case) -> dict[str, float]:
    """max|haste − ref| / max|eager − ref| for loss and gradients, ref in float64, on one batch entry.

    Raises AssertionError where it exceeds 2 plus one rounding of the output: what is wrong is not timed.
    """
    operands = [x[:1] for x in case.operands()]
    exact = forward_backward(reference.attn_align_loss, [x.double() for x in operands])()
    eager = forward_backward(reference.attn_align_loss, operands)()
    ours = forward_backward(haste_ext.attn_align_loss, operands)()
    ratios = {}
    for name, mine, theirs, ref in zip(("loss", "dq", "dk"), ours, eager, exact, strict=True):
        error, yardstick = ((x.double() - ref).abs().max().item() for x in (mine, theirs))
        rounding = torch.finfo(mine.dtype).eps * ref.abs().max().item()
        assert error <= 2 * yardstick + rounding, f"{name}: error {error:.2e}, eager's is {yardstick:.2e}"
        ratios[name] = error / max(yardstick, 1e-300)
    return ratios
