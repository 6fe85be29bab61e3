"""Both losses against their formulas, written out in float64."""

from __future__ import annotations

import torch
from haste.alignment import alignment_losses
from haste.models import ModelOutput
from haste.teachers import TeacherOutput
from torch.nn import functional as F

BATCH, TOKENS, PREFIX = 2, 9, 3


def random_pair(heads: int, tokens: int, width: int, requires_grad: bool = False):
    return tuple(torch.randn(BATCH, heads, tokens, width, requires_grad=requires_grad) for _ in range(2))


def cross_entropy_of_maps(student, teacher) -> torch.Tensor:
    (student_q, student_k), (teacher_q, teacher_k) = student, teacher
    student_q, student_k = student_q[:, :2].double(), student_k[:, :2].double()
    teacher_q, teacher_k = teacher_q[:, :2, PREFIX:].double(), teacher_k[:, :2, PREFIX:].double()
    student_map = (student_q @ student_k.mT * student_q.shape[-1] ** -0.5).log_softmax(-1)
    teacher_map = (teacher_q @ teacher_k.mT * teacher_q.shape[-1] ** -0.5).softmax(-1)
    return -(teacher_map * student_map).sum(-1).mean()


def test_attention_loss_is_the_mean_over_pairs_of_the_cross_entropy_of_the_leading_heads():
    torch.manual_seed(0)
    student = [random_pair(4, TOKENS, 6, requires_grad=True) for _ in range(2)]
    teacher = [random_pair(2, PREFIX + TOKENS, 8) for _ in range(2)]
    losses = alignment_losses(ModelOutput(torch.empty(0), student, []), [TeacherOutput(teacher, PREFIX, None)])
    expected = torch.stack([cross_entropy_of_maps(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
    torch.testing.assert_close(losses.attention.double(), expected, rtol=1e-5, atol=1e-6)
    assert losses.feature is None

    losses.attention.backward()
    q = student[0][0]
    assert q.grad[:, :2].abs().sum() > 0
    assert q.grad[:, 2:].abs().sum() == 0  # the student's other heads stay free


def test_feature_loss_is_the_mean_over_teachers_of_minus_the_cosine():
    torch.manual_seed(0)
    projections = [torch.randn(BATCH, TOKENS, width, requires_grad=True) for width in (5, 7)]
    teachers = [TeacherOutput([], PREFIX, torch.randn(BATCH, TOKENS, width)) for width in (5, 7)]
    losses = alignment_losses(ModelOutput(torch.empty(0), [], projections), teachers)
    cosines = [
        F.cosine_similarity(z.double(), t.patch_tokens.double(), dim=-1).mean()
        for z, t in zip(projections, teachers, strict=True)
    ]
    torch.testing.assert_close(losses.feature.double(), -sum(cosines) / 2, rtol=1e-5, atol=1e-6)
    assert losses.attention is None


def test_nothing_asked_nothing_computed():
    losses = alignment_losses(ModelOutput(torch.empty(0), [], []), [TeacherOutput([], 0, None)])
    assert losses == (None, None)
