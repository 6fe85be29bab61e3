"""The two alignment losses of HASTE (arXiv 2505.16792, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import haste_ext
from haste.models.sit import SiTOutput
from haste.teachers.vision import TeacherOutput


class AlignmentLosses(NamedTuple):
    """L_A and L_R, scalars in fp32; None for the one that is off."""

    attention: Tensor | None
    feature: Tensor | None


def alignment_losses(student: SiTOutput, teachers: Sequence[TeacherOutput]) -> AlignmentLosses:
    """Both losses of one batch, from what the student and its teachers gave out.

    A loss is off when the student was not asked for what it needs: no aligned layers, no projections. Where there are
    several teachers, the first one's attention is the model for the student's.
    """
    attention = attention_loss(student, teachers[0]) if student.queries_keys else None
    feature = feature_loss(student, teachers) if student.projections else None
    return AlignmentLosses(attention, feature)


def attention_loss(student: SiTOutput, teacher: TeacherOutput) -> Tensor:
    """L_A: cross-entropy of the student's attention against the teacher's.

    The mean over batch, heads and queries, then over the layer pairs. The first min(H_s, H_t) heads are aligned,
    and the teacher's class and register tokens are left out as queries and as keys.
    """
    pairs = zip(student.queries_keys, teacher.queries_keys, strict=True)
    losses = [
        haste_ext.attn_align_loss(student_q, student_k, teacher_q, teacher_k, teacher_prefix=teacher.prefix)
        for (student_q, student_k), (teacher_q, teacher_k) in pairs
    ]
    return torch.stack(losses).mean()


def feature_loss(student: SiTOutput, teachers: Sequence[TeacherOutput]) -> Tensor:
    """L_R, the loss of REPA (arXiv 2410.06940): −cosine per token of projected hidden state and teacher feature.

    The mean over batch and tokens, then over the teachers.
    """
    pairs = zip(student.projections, teachers, strict=True)
    return torch.stack([haste_ext.token_cosine_loss(z, teacher.patch_tokens) for z, teacher in pairs]).mean()
