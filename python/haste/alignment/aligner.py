"""Alignment of a student, the diffusion transformer, with frozen vision encoders: layers, losses, and both in a module.

The method is HASTE's (arXiv 2505.16792, section 3.2), which contains REPA's (arXiv 2410.06940).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import haste_ext
from haste.alignment.student_grid import on_teachers_grids
from haste.errors import UserError
from haste.models import ModelOutput, PublishedAlignment, families, join
from haste.teachers.encoder import GridRule, TeacherOutput, VisionTeacher
from haste.validation import SIDE, shown

# ---- which layers ----


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers, counted from 0: the attention of student[i] is aligned with that of teacher[i]."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, name: str = "layer_map") -> LayerMap:
        """Parse '4:8,5:9': student layers 4 and 5 are aligned with teacher layers 8 and 9.

        Args:
            name: what errors call the text.

        Raises:
            UserError: another text.
        """
        try:
            pairs = [tuple(int(layer) for layer in pair.split(":")) for pair in text.split(",")]
            student, teacher = zip(*pairs, strict=True)
        except ValueError as error:
            raise UserError(f"{name} must be pairs student:teacher of layers counted from 0, such as 4:8,5:9, "
                            f"got {text!r}") from error  # fmt: skip
        if len(set(student)) < len(student):
            raise UserError(f"--layer-map must name each layer of the student once, got {text!r}")
        return cls(student, teacher)

    def check_student(self, depth: int) -> None:
        """Raise UserError if a student of this depth lacks one of the layers."""
        for layer in self.student:
            if not 0 <= layer < depth:
                raise UserError(f"--layer-map must name student layers from 0 to {depth - 1}, got {layer}")

    def __str__(self) -> str:
        return ",".join(f"{s}:{t}" for s, t in zip(self.student, self.teacher, strict=True))


REPA_DEPTH = 8  # counted from 1


def _published(model: str) -> PublishedAlignment | None:
    """HASTE's layers for a published size such as SiT-XL/2."""
    size = model.split("/")[0]
    return next((f.published_alignment[size] for f in families() if size in f.published_alignment), None)


def choose_encoder_depth(model: str, depth: int, attention: bool) -> int:
    """The default of --encoder-depth: the block, counted from 1, whose features are aligned.

    Args:
        model: name of a size.
        depth: blocks of the model.
        attention: whether attention is aligned as well, as in HASTE.
    """
    published = _published(model) if attention else None
    return min(published.encoder_depth if published else REPA_DEPTH, depth)


def choose_layer_map(text: str, model: str) -> LayerMap:
    """Parse --layer-map; if it is empty, return HASTE's for this model.

    Args:
        model: name of a size, such as SiT-XL/2.

    Raises:
        UserError: a text that is no layer map, or none for a model without a published one.
    """
    if text:
        return LayerMap.parse(text, "--layer-map")
    published = _published(model)
    if not published or not published.layer_map:
        known = [name for f in families() for name, own in f.published_alignment.items() if own.layer_map]
        raise UserError(f"--layer-map must be given for {model}, such as 4:8,5:9; there is no published layer map but "
                        f"for {', '.join(known)}")  # fmt: skip
    return LayerMap.parse(published.layer_map)


# ---- the losses ----

QueriesKeys = Sequence[tuple[Tensor, Tensor]]


class AlignmentLosses(NamedTuple):
    """L_A and L_R, and that of a student with its own EMA; scalars in fp32, None for one that is off."""

    attention: Tensor | None
    feature: Tensor | None
    itself: Tensor | None = None


def alignment_losses(
    queries_keys: QueriesKeys,
    features: Sequence[Tensor],
    teachers: Sequence[TeacherOutput],
    *,
    prefix: int = 0,
    causal: int = 0,
) -> AlignmentLosses:
    """Both losses of a batch. A loss is off if its argument is empty.

    Args:
        queries_keys, prefix, causal: as for `attention_loss`, with the first teacher.
        features: as for `feature_loss`.
        teachers: the outputs of the teachers.
    """
    attention = attention_loss(queries_keys, teachers[0], prefix=prefix, causal=causal) if queries_keys else None
    feature = feature_loss(features, teachers) if features else None
    return AlignmentLosses(attention, feature)


def attention_loss(queries_keys: QueriesKeys, teacher: TeacherOutput, *, prefix: int = 0, causal: int = 0) -> Tensor:
    """L_A: cross-entropy of the student's attention against the teacher's (arXiv 2505.16792, section 3.2).

    The mean over batch, heads and queries, then over the layer pairs. The first min(H_s, H_t) heads are aligned.
    Prefix tokens are left out as queries and as keys, on both sides.

    Args:
        queries_keys: q and k of each student layer of the layer map, as attention used them, each
            (B, H_s, prefix + N, D); any strides, fp32, fp16 or bf16.
        teacher: with q and k of as many layers, (B, H_t, its prefix + N, D_t).
        prefix: tokens of the student in front of the image's, such as a text's.
        causal: tokens of a block where attention is block-causal over the image's, as xAR's is over cells; both maps
            are masked alike. 0: each sees all.

    Returns:
        A scalar, fp32.
    """
    losses = [
        haste_ext.attn_align_loss(
            *student, *target, student_prefix=prefix, teacher_prefix=teacher.prefix, causal=causal
        )
        for student, target in zip(queries_keys, teacher.queries_keys, strict=True)
    ]
    return torch.stack(losses).mean()


def feature_loss(features: Sequence[Tensor], teachers: Sequence[TeacherOutput]) -> Tensor:
    """L_R, REPA's loss (arXiv 2410.06940): −cosine per token of projected hidden state and teacher feature.

    The mean over batch and tokens, then over the teachers.

    Args:
        features: per teacher, hidden states projected to its width, (B, N, C); (B, 1 + N, C) with the class token in
            front, if the teachers return theirs (REG, arXiv 2507.01467, eq. 6).
        teachers: each with patch_tokens (B, N, C).

    Returns:
        A scalar, fp32.
    """
    pairs = zip(features, teachers, strict=True)
    return torch.stack([haste_ext.token_cosine_loss(z, teacher.features) for z, teacher in pairs]).mean()


def reordered(output: TeacherOutput, order: Tensor) -> TeacherOutput:
    """A teacher's output with the image's tokens in a student's order, and without its prefix.

    Args:
        order: (N,) int64, on the same device: which of the teacher's tokens, row by row, comes first, and so on.
    """
    pairs = [
        (q[:, :, output.prefix :].index_select(2, order), k[:, :, output.prefix :].index_select(2, order))
        for q, k in output.queries_keys
    ]
    features = None if output.patch_tokens is None else output.patch_tokens.index_select(1, order)
    return TeacherOutput(pairs, 0, features)


def spatially_normalised(features: Tensor, gamma: float) -> Tensor:
    """iREPA's spatial normalisation of a teacher's tokens (arXiv 2512.10794): (x − γ·mean)/(std + 1e-6) per image and
    channel, both over the tokens; std divides by their number less one, as in the public code.

    Args:
        features: (B, N, C), any floating-point type.
        gamma: how much of the mean is taken away.

    Returns:
        (B, N, C), of at least fp32.

    Raises:
        UserError: one token, which has no deviation.
    """
    if features.shape[1] < 2:
        raise UserError("--spnorm-method must be none for one token, got zscore")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


# ---- both in a module ----


class Aligner(nn.Module):
    """HASTE's and REPA's alignment of any student with frozen vision encoders.

    In your own trainer, with a student of 16 x 16 tokens that returns its q and k, and a projector per teacher onto
    `aligner.z_dims[i]` features:

        aligner = Aligner.from_pretrained("dinov2-vit-b", "4:8,5:9", grid=16)
        ...
        outputs = aligner.teacher_outputs(images)
        losses = aligner.losses([(q4, k4), (q5, k5)], [projector(hidden)], outputs)
        loss = velocity_loss + aligner.weigh(losses)

    It has the only references to the teachers. HASTE drops it after some steps, which frees them.

    Args:
        teachers: one or more; the first one's attention is aligned, and all features.
        layer_map: the layers of student and first teacher; None: attention is not aligned.
        proj_coeff, attn_coeff: weights of L_R and L_A. 0: the loss is not computed.
        zscore_alpha: γ of iREPA's spatial normalisation of the teachers' features, see `spatially_normalised`. None:
            the features as they are.
        interpolates_student: the teachers have grids of their own, to which the student's q, k and features are
            interpolated.
        class_token: the teachers return their class tokens, and the student has one in front of the image's tokens.

    Attributes:
        student_layers: the student's layers, from 0, whose q and k `losses` takes, in this order.
        project: whether `losses` takes projected features.
        z_dims: their widths, one per teacher; empty if `project` is false.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        layer_map: LayerMap | None,
        proj_coeff: float,
        attn_coeff: float,
        zscore_alpha: float | None = None,
        interpolates_student: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.student_layers = layer_map.student if layer_map is not None and attn_coeff else ()
        self.proj_coeff = proj_coeff
        self.attn_coeff = attn_coeff
        self.zscore_alpha = zscore_alpha
        self.interpolates_student = interpolates_student
        self.class_token = class_token
        self.project = proj_coeff != 0
        self.z_dims: tuple[int, ...] = tuple(teacher.width for teacher in teachers) if self.project else ()

    @classmethod
    def from_pretrained(
        cls,
        names: str | Sequence[str],
        layer_map: LayerMap | str | None = None,
        grid: int | None = None,
        proj_coeff: float = 0.5,
        attn_coeff: float = 0.5,
        image_size: int | None = None,
        grid_rule: GridRule = "match",
        zscore_alpha: float | None = None,
        class_token: bool = False,
    ) -> Aligner:
        """Load the teachers, each without the layers that no loss needs.

        Args:
            names: of one teacher or several: folders, hub names, or short names as for `--enc-type`.
            layer_map: such as "4:8,5:9", student:teacher, from 0. None: attention is not aligned.
            grid: tokens along a side of the student's image. None: the teacher's.
            proj_coeff, attn_coeff: weights of L_R and L_A. 0: the loss is off; without L_R only the first teacher is
                loaded.
            image_size, grid_rule: the teachers' image size in pixels, and what to do if their grid differs from the
                student's; see VisionTeacher.
            zscore_alpha: γ of iREPA's spatial normalisation, 0.6 in its code. None: no normalisation.
            class_token: the student denoises the first teacher's class token (REG, arXiv 2507.01467), which
                `teacher_outputs` returns.

        Raises:
            UserError: an unknown teacher, a layer that it does not have, a grid or size that does not fit, a teacher
                without the class token.
            ValueError: both losses are off, and there is no class token.
        """
        if grid is not None and grid not in SIDE:
            raise UserError(f"grid must be {SIDE}, or None for the teacher's, got {shown(grid)}")
        names = [names] if isinstance(names, str) else names
        layer_map = LayerMap.parse(layer_map) if isinstance(layer_map, str) else layer_map
        aligned = layer_map.teacher if layer_map is not None and attn_coeff else ()
        features = proj_coeff != 0
        teachers = [
            VisionTeacher.from_pretrained(
                name,
                layers=aligned if index == 0 else (),
                grid=grid,
                image_size=image_size,
                features=features,
                grid_rule=grid_rule,
                class_token=class_token,
            )
            for index, name in enumerate(names if features else names[:1])
        ]
        on_teachers = grid_rule == "interpolate-student"
        return cls(teachers, layer_map, proj_coeff, attn_coeff, zscore_alpha, on_teachers, class_token)

    freed = "the teacher is"  # when alignment ends

    @property
    def aligns(self) -> bool:
        """Whether any loss is on; else the first teacher is there for its class token alone."""
        return self.project or bool(self.student_layers)

    def without_losses(self) -> Aligner | None:
        """What remains when alignment ends: the first teacher with its class token; None if no model denoises it."""
        if not self.class_token:
            return None
        first = self.teachers[0]
        first.return_class_token_alone()
        return Aligner([first], None, proj_coeff=0, attn_coeff=0, class_token=True)

    def describe(self, num_heads: int) -> str:
        """The teachers and the aligned heads of a student with this number of heads, in one line."""
        teachers = ", ".join(teacher.describe() for teacher in self.teachers)
        if self.interpolates_student:
            teachers += ", to which the student's are interpolated"
        teachers += "; its class token is denoised" if self.class_token else ""
        if not self.student_layers:
            return teachers
        theirs = self.teachers[0].num_heads
        if num_heads == theirs:
            heads = f"all {num_heads} heads"
        else:
            side, more = ("student", num_heads) if num_heads > theirs else ("teacher", theirs)
            heads = f"the first {min(num_heads, theirs)} heads, of {more} that the {side} has,"
        return f"{teachers}; {heads} are aligned"

    def teacher_outputs(self, images: Tensor) -> list[TeacherOutput]:
        """The outputs of all teachers, without gradient.

        Args:
            images: (B, C, H, W), float, in [-1, 1], of any size; C is 1 or the teacher's.

        Raises:
            ValueError: images that are not of a floating-point type.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be of a floating-point type, in [-1, 1], got {images.dtype}")
        outputs = [teacher(images) for teacher in self.teachers]
        if self.zscore_alpha is None or not self.project:
            return outputs
        return [replace(out, patch_tokens=spatially_normalised(out.patch_tokens, self.zscore_alpha)) for out in outputs]

    def with_class_token(self, x: Tensor, outputs: Sequence[TeacherOutput]) -> Tensor:
        """What the model denoises of images x (B, C, H, W): these, or with the first teacher's class token one state,
        (B, C·H·W + K)."""
        return join(x, outputs[0].class_token) if self.class_token else x

    def losses(
        self,
        queries_keys: QueriesKeys,
        features: Sequence[Tensor],
        outputs: Sequence[TeacherOutput],
        prefix: int = 0,
        causal: int = 0,
        order: Tensor | None = None,
    ) -> AlignmentLosses:
        """L_A and L_R of a batch, without their weights.

        Args:
            queries_keys: q and k of each of `student_layers` as attention used them, each (B, H, prefix + N, D), any
                strides. The first min(H, teacher's heads) are aligned; D may differ from the teacher's.
            features: per teacher (B, N, z_dims[i]), with a class token (B, 1 + N, z_dims[i]); empty if `project` is
                false.
            outputs: what `teacher_outputs` returned for the same images.
            prefix: tokens of q and k in front of the image's N, such as a text's.
            causal: tokens of a block where the student's attention is block-causal over the image's; 0: it is not.
            order: (N,) int64, which token of the image, row by row, each row of q, k and features is after the prefix;
                None: they are row by row.

        Returns:
            Two scalars, fp32; None for one that is off.

        Raises:
            ValueError: a wrong number of layers or features, or shapes that do not fit; queries_keys of block-causal
                attention that would be interpolated, for no mask fits them.
        """
        if len(queries_keys) != len(self.student_layers):
            raise ValueError(f"queries_keys must have a pair for each of the layers {self.student_layers}, got "
                             f"{len(queries_keys)} pairs")  # fmt: skip
        if len(features) != len(outputs) * self.project:
            raise ValueError(f"features must have an entry for each of {len(outputs) * self.project} teachers, got "
                             f"{len(features)}")  # fmt: skip
        if self.interpolates_student:
            if causal and queries_keys:
                raise ValueError(f"causal must be 0 for attention that is interpolated, got {causal}")
            queries_keys, features = on_teachers_grids(queries_keys, features, outputs, prefix, order)
            prefix, causal = 0, 0
        elif order is not None:
            outputs = [reordered(output, order) for output in outputs]
        return alignment_losses(queries_keys, features, outputs, prefix=prefix, causal=causal)

    def losses_of(self, output: ModelOutput, outputs: Sequence[TeacherOutput]) -> AlignmentLosses:
        """`losses` of what one of haste's models returned, called with `student_layers` and `project`."""
        return self.losses(output.queries_keys, output.projections, outputs, output.prefix, output.causal, output.order)

    def weigh(self, losses: AlignmentLosses) -> Tensor:
        """proj_coeff·L_R + attn_coeff·L_A, a scalar."""
        weighted = ((self.proj_coeff, losses.feature), (self.attn_coeff, losses.attention))
        return sum(coefficient * loss for coefficient, loss in weighted if loss is not None)

    def forward(
        self, output: ModelOutput, images: Tensor, outputs: Sequence[TeacherOutput] | None = None
    ) -> tuple[Tensor, AlignmentLosses]:
        """Both losses of a batch of one of haste's models: their weighted sum, and each without its weight.

        Args:
            output: of the model, called with `student_layers` and `project`.
            images: as for `teacher_outputs`.
            outputs: what that returned for them, if it has been called.
        """
        losses = self.losses_of(output, self.teacher_outputs(images) if outputs is None else outputs)
        return self.weigh(losses), losses
