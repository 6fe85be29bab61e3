"""Which student layer learns the attention of which teacher layer.

The two alignment losses of HASTE (arXiv 2505.16792, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import haste_ext
from haste.errors import UserError
from haste.models import ModelOutput
from haste.teachers.encoder import TeacherOutput


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers, both counted from 0: student[i] learns from teacher[i]."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> LayerMap:
        """'4:8,5:9' -> student layers 4 and 5 learn from teacher layers 8 and 9."""
        try:
            pairs = [tuple(int(layer) for layer in pair.split(":")) for pair in text.split(",")]
            student, teacher = zip(*pairs, strict=True)
        except ValueError as error:
            raise UserError(
                f"--layer-map is {text!r}; it must be pairs student:teacher of layers counted from 0, such as 4:8,5:9"
            ) from error
        return cls(student, teacher)

    def check_student(self, depth: int) -> None:
        """UserError if the map names a layer that a student of this depth does not have."""
        outside = [layer for layer in self.student if not 0 <= layer < depth]
        if outside:
            raise UserError(
                f"the layer map asks for layer {outside[0]} of the student, which has {depth} layers; "
                f"student layers must be 0 to {depth - 1}"
            )

    def __str__(self) -> str:
        return ",".join(f"{s}:{t}" for s, t in zip(self.student, self.teacher, strict=True))


# HASTE (arXiv 2505.16792), for DINOv2-B: the same maps at 256 and 512 pixels.
PAPER_LAYER_MAPS = {
    "SiT-B": LayerMap((2, 3, 4), (7, 9, 11)),
    "SiT-L": LayerMap((4, 5, 6, 7), (8, 9, 10, 11)),
    "SiT-XL": LayerMap((4, 5, 6, 7), (8, 9, 10, 11)),
}

# HASTE's feature depths, counted from 1, where they are not REPA's own. S is not in the paper; it is as deep as B.
PAPER_DEPTHS = {"SiT-S": 5, "SiT-B": 5}
REPA_DEPTH = 8


def choose_encoder_depth(model: str, depth: int, attention: bool) -> int:
    """The block, counted from 1, whose features are aligned when nobody says which.

    depth: blocks of the model. attention: whether attention is aligned as well, as in HASTE.
    """
    chosen = PAPER_DEPTHS.get(model.split("/")[0], REPA_DEPTH) if attention else REPA_DEPTH
    return min(chosen, depth)


def choose_layer_map(text: str, model: str) -> LayerMap:
    """The layer map that was typed, or, if none was, the paper's for this model (a name such as SiT-XL/2)."""
    if text:
        return LayerMap.parse(text)
    size = model.split("/")[0]
    if size not in PAPER_LAYER_MAPS:
        known = ", ".join(PAPER_LAYER_MAPS)
        raise UserError(
            f"there is no published layer map for {model}, only for {known}; give one by --layer-map, such as 4:8,5:9"
        )
    return PAPER_LAYER_MAPS[size]


class AlignmentLosses(NamedTuple):
    """L_A and L_R, scalars in fp32; None for the one that is off."""

    attention: Tensor | None
    feature: Tensor | None


def alignment_losses(student: ModelOutput, teachers: Sequence[TeacherOutput]) -> AlignmentLosses:
    """Both losses of one batch, from what the student and its teachers gave out.

    A loss is off when the student was not asked for what it needs: no aligned layers, no projections. Where there are
    several teachers, the first one's attention is the model for the student's.
    """
    attention = attention_loss(student, teachers[0]) if student.queries_keys else None
    feature = feature_loss(student, teachers) if student.projections else None
    return AlignmentLosses(attention, feature)


def attention_loss(student: ModelOutput, teacher: TeacherOutput) -> Tensor:
    """L_A: cross-entropy of the student's attention against the teacher's.

    The mean over batch, heads and queries, then over the layer pairs. The first min(H_s, H_t) heads are aligned,
    and the teacher's class and register tokens are left out as queries and as keys.
    """
    pairs = zip(student.queries_keys, teacher.queries_keys, strict=True)
    losses = [
        haste_ext.attn_align_loss(
            student_q, student_k, teacher_q, teacher_k, student_prefix=student.prefix, teacher_prefix=teacher.prefix
        )
        for (student_q, student_k), (teacher_q, teacher_k) in pairs
    ]
    return torch.stack(losses).mean()


def feature_loss(student: ModelOutput, teachers: Sequence[TeacherOutput]) -> Tensor:
    """L_R, the loss of REPA (arXiv 2410.06940): −cosine per token of projected hidden state and teacher feature.

    The mean over batch and tokens, then over the teachers.
    """
    pairs = zip(student.projections, teachers, strict=True)
    return torch.stack([haste_ext.token_cosine_loss(z, teacher.patch_tokens) for z, teacher in pairs]).mean()
