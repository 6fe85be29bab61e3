"""The baseline: attention alignment as it is written in eager code that materialises the maps.

As the public code of HASTE and REPA does: every block forms q·kᵀ beside its fused attention, the aligned layers' maps
are kept, softmax comes first and then its logarithm, the cosine goes sample by sample in a Python loop, and after τ
the maps and the projector still run. In its favour, maps of layers that are not aligned are let go at once, the teacher
forms the maps of the aligned layers alone, of MM-DiT's joint attention the image's rows and columns alone are formed,
and the four waits for a GPU in every step are not made.
"""

from __future__ import annotations

import torch
from haste.alignment import LayerMap
from haste.models import ModelOutput
from haste.models.layers import Modulation
from haste.models.mmdit import JointBlock
from haste.models.sit_block import Attention
from haste.teachers import TeacherOutput
from torch import Tensor, nn
from torch.nn import functional as F


class MapAttention(Attention):
    """Hands out its logits, (B, H, N, N), where Attention hands out q and k."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out, (q, k) = super().forward(tokens)
        return out, q @ k.mT * q.shape[-1] ** -0.5


class MapJointBlock(JointBlock):
    """The same of a joint attention: the image's logits, (B, H, N, N)."""

    def attend_jointly(
        self, text: Tensor, image: Tensor, c: Tensor
    ) -> tuple[tuple[Tensor, ...], Modulation, Tensor, Tensor]:
        *others, (q, k) = super().attend_jointly(text, image, c)
        q, k = (x[:, :, text.shape[1] :] for x in (q, k))
        return *others, q @ k.mT * q.shape[-1] ** -0.5


def materialise_maps(model: nn.Module) -> None:
    """From now on every block of the model forms its map; SiT's attentions are new, and their weights wait to be
    loaded."""
    for block in model.blocks:
        if isinstance(block, JointBlock):
            block.__class__ = MapJointBlock
            continue
        attn = block.attn
        block.attn = MapAttention(attn.qkv.in_features, attn.num_heads, qk_norm=False, backend="sdpa")


class EagerAligner(nn.Module):
    """Called as haste.alignment.Aligner is; `stopped` is the state after τ, in which no loss is asked for any more."""

    def __init__(
        self, teacher: nn.Module, layer_map: LayerMap, proj_coeff: float, attn_coeff: float, stopped: bool
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.student_layers = layer_map.student
        self.project = True
        self.proj_coeff = proj_coeff
        self.attn_coeff = attn_coeff
        self.stopped = stopped

    def forward(self, output: ModelOutput, images: Tensor) -> tuple[Tensor, None]:
        lesson = self.teacher(images)
        teacher_maps = [teacher_map(q, k, lesson.prefix) for q, k in lesson.queries_keys]
        if self.stopped:
            return torch.zeros((), device=images.device), None
        attention = attention_loss(output.queries_keys, teacher_maps)
        feature = feature_loss(output.projections[0], lesson)
        return self.proj_coeff * feature + self.attn_coeff * attention, None


@torch.no_grad()
def teacher_map(q: Tensor, k: Tensor, prefix: int) -> Tensor:
    """The whole map is formed; class and register tokens leave it before the softmax."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return logits[:, :, prefix:, prefix:].softmax(dim=-1)


def attention_loss(student_logits: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
    losses = []
    for logits, target in zip(student_logits, teacher_maps, strict=True):
        heads = min(logits.shape[1], target.shape[1])
        student = logits[:, :heads].softmax(dim=-1)
        losses.append(-(target[:, :heads] * student.log()).sum(dim=-1).mean())
    return torch.stack(losses).mean()


def feature_loss(projection: Tensor, lesson: TeacherOutput) -> Tensor:
    total = projection.new_zeros(())
    for student, teacher in zip(projection, lesson.patch_tokens, strict=True):
        cosine = (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(dim=-1)
        total = total - cosine.mean()
    return total / len(projection)
