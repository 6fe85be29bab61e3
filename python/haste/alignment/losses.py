"""Which layer of the student learns from which of the teacher, and the two alignment losses of HASTE.

HASTE is arXiv 2505.16792; its losses are in section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import haste_ext
from haste.errors import UserError
from haste.models import PublishedAlignment, families
from haste.teachers.encoder import TeacherOutput


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers, both counted from 0: student[i] learns from teacher[i]."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> LayerMap:
        """Read '4:8,5:9': student layers 4 and 5 learn from teacher layers 8 and 9.

        Raises:
            UserError: no such text.
        """
        try:
            pairs = [tuple(int(layer) for layer in pair.split(":")) for pair in text.split(",")]
            student, teacher = zip(*pairs, strict=True)
        except ValueError as error:
            raise UserError(f"--layer-map must be pairs student:teacher of layers counted from 0, such as 4:8,5:9, "
                            f"got {text!r}") from error  # fmt: skip
        return cls(student, teacher)

    def check_student(self, depth: int) -> None:
        """Raise UserError if the map names a layer that a student of this depth does not have."""
        for layer in self.student:
            if not 0 <= layer < depth:
                raise UserError(f"the layer map asks for layer {layer} of the student, which has {depth} layers; "
                                f"student layers must be 0 to {depth - 1}")  # fmt: skip

    def __str__(self) -> str:
        return ",".join(f"{s}:{t}" for s, t in zip(self.student, self.teacher, strict=True))


REPA_DEPTH = 8  # counted from 1; HASTE's are the families' own


def _published(model: str) -> PublishedAlignment | None:
    """HASTE's layers for a size of any family, named such as SiT-XL/2; None where there are none."""
    size = model.split("/")[0]
    found = [f.published_alignment[size] for f in families() if size in f.published_alignment]
    return found[0] if found else None


def choose_encoder_depth(model: str, depth: int, attention: bool) -> int:
    """The block, counted from 1, whose features are aligned when nobody says which.

    Args:
        model: name of a size.
        depth: blocks of the model.
        attention: whether attention is aligned as well, as in HASTE.
    """
    published = _published(model) if attention else None
    return min(published.encoder_depth if published else REPA_DEPTH, depth)


def choose_layer_map(text: str, model: str) -> LayerMap:
    """The layer map that was given, or, if none was, HASTE's for this model.

    Args:
        text: as `LayerMap.parse` reads it; may be empty.
        model: name of a size, such as SiT-XL/2.

    Raises:
        UserError: a text that is no map; none is given and none published.
    """
    if text:
        return LayerMap.parse(text)
    published = _published(model)
    if not published or not published.layer_map:
        known = [name for f in families() for name, own in f.published_alignment.items() if own.layer_map]
        raise UserError(f"--layer-map must be given for {model}, such as 4:8,5:9; there is no published layer map but "
                        f"for {', '.join(known)}")  # fmt: skip
    return LayerMap.parse(published.layer_map)


QueriesKeys = Sequence[tuple[Tensor, Tensor]]


class AlignmentLosses(NamedTuple):
    """L_A and L_R, scalars in fp32; None for the one that is off."""

    attention: Tensor | None
    feature: Tensor | None


def alignment_losses(
    queries_keys: QueriesKeys, features: Sequence[Tensor], teachers: Sequence[TeacherOutput], *, prefix: int = 0
) -> AlignmentLosses:
    """Both losses of one batch; one is off where the student's side of it is empty.

    Args:
        queries_keys, prefix: as for `attention_loss`; the first teacher's attention is the model for it.
        features: as for `feature_loss`.
        teachers: what each teacher returned.
    """
    attention = attention_loss(queries_keys, teachers[0], prefix=prefix) if queries_keys else None
    feature = feature_loss(features, teachers) if features else None
    return AlignmentLosses(attention, feature)


def attention_loss(queries_keys: QueriesKeys, teacher: TeacherOutput, *, prefix: int = 0) -> Tensor:
    """L_A: cross-entropy of the student's attention against the teacher's (arXiv 2505.16792, section 3.2).

    The mean over batch, heads and queries, then over the layer pairs. The first min(H_s, H_t) heads are aligned, and
    tokens in front of the image's are left out as queries and as keys, on both sides.

    Args:
        queries_keys: per layer of the student, in the map's order, q and k as attention used them, each
            (B, H_s, prefix + N, D); any strides, fp32, fp16 or bf16.
        teacher: with q and k of as many layers, (B, H_t, its prefix + N, D_t).
        prefix: tokens of the student in front of the image's, such as a text's.

    Returns:
        A scalar, fp32.
    """
    losses = [
        haste_ext.attn_align_loss(*student, *target, student_prefix=prefix, teacher_prefix=teacher.prefix)
        for student, target in zip(queries_keys, teacher.queries_keys, strict=True)
    ]
    return torch.stack(losses).mean()


def feature_loss(features: Sequence[Tensor], teachers: Sequence[TeacherOutput]) -> Tensor:
    """L_R, the loss of REPA (arXiv 2410.06940): −cosine per token of projected hidden state and teacher feature.

    The mean over batch and tokens, then over the teachers.

    Args:
        features: per teacher, hidden states projected to its width, (B, N, C).
        teachers: each with patch_tokens (B, N, C).

    Returns:
        A scalar, fp32.
    """
    pairs = zip(features, teachers, strict=True)
    return torch.stack([haste_ext.token_cosine_loss(z, teacher.patch_tokens) for z, teacher in pairs]).mean()
