"""The teachers of a run, what they return, what the student has to give, and the weighted losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from haste.alignment.losses import AlignmentLosses, LayerMap, QueriesKeys, alignment_losses
from haste.models import ModelOutput
from haste.teachers.encoder import GridRule, TeacherOutput, VisionTeacher


class Aligner(nn.Module):
    """HASTE's and REPA's alignment of a student, of any kind, with frozen vision encoders.

    In a trainer of your own, with a student of 16 x 16 tokens that returns its q and k, and a projector per teacher
    onto `aligner.z_dims[i]` features:

        aligner = Aligner.from_pretrained("dinov2-vit-b", "4:8,5:9", grid=16)
        ...
        outputs = aligner.teacher_outputs(images)
        losses = aligner.losses([(q4, k4), (q5, k5)], [projector(hidden)], outputs)
        loss = velocity_loss + aligner.weigh(losses)

    It holds the only references to the teachers, so that dropping it frees them: HASTE drops it after some steps.

    Args:
        teachers: one or more; the first one's attention is aligned, and all features.
        layer_map: None when attention is not aligned. The first teacher's layers are meant.
        proj_coeff, attn_coeff: weights of L_R and L_A; what has weight 0 is not needed and not computed.

    Attributes:
        student_layers: the student's layers, from 0, whose q and k `losses` takes, in this order.
        project: whether `losses` takes projected features.
        z_dims: their widths, one per teacher; empty where `project` is false.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], layer_map: LayerMap | None, proj_coeff: float, attn_coeff: float
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.student_layers = layer_map.student if layer_map is not None and attn_coeff else ()
        self.proj_coeff = proj_coeff
        self.attn_coeff = attn_coeff

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
    ) -> Aligner:
        """Load the teachers; each keeps only what the losses call for.

        Args:
            names: of one teacher or several: folders, hub names, or short names as of `--enc-type`.
            layer_map: such as "4:8,5:9", student:teacher, from 0. None: attention is not aligned.
            grid: tokens along a side of the student's image. None: as many as the teacher has.
            proj_coeff, attn_coeff: weights of L_R and L_A. 0: that loss is off; without L_R only the first teacher is
                loaded, and no later layers than the map names.
            image_size, grid_rule: the pixels per side that the teachers see, and what to do where their grid is not
                the student's; see VisionTeacher.

        Raises:
            UserError: no such teacher, a layer that it does not have, a grid or size that does not fit.
            ValueError: both losses are off.
        """
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
            )
            for index, name in enumerate(names if features else names[:1])  # the others would have nothing to do
        ]
        return cls(teachers, layer_map, proj_coeff, attn_coeff)

    @property
    def project(self) -> bool:
        return self.proj_coeff != 0

    @property
    def z_dims(self) -> tuple[int, ...]:
        return tuple(teacher.width for teacher in self.teachers) if self.project else ()

    def describe(self, num_heads: int) -> str:
        """The teachers of a student of so many heads, and what is done where the two differ, in one line."""
        teachers = ", ".join(teacher.describe() for teacher in self.teachers)
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
        """What every teacher makes of the images, without gradient.

        Args:
            images: (B, C, H, W), float, in [-1, 1], of any size; C is 1 or the teacher's.

        Raises:
            ValueError: images that are not of a floating-point type.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be of a floating-point type, in [-1, 1], got {images.dtype}")
        return [teacher(images) for teacher in self.teachers]

    def losses(
        self, queries_keys: QueriesKeys, features: Sequence[Tensor], outputs: Sequence[TeacherOutput], prefix: int = 0
    ) -> AlignmentLosses:
        """L_A and L_R of a batch, without their weights.

        Args:
            queries_keys: per layer of `student_layers` q and k as attention used them, each (B, H, prefix + N, D), any
                strides. The first min(H, teacher's heads) are aligned; D may be another than the teacher's.
            features: per teacher (B, N, z_dims[i]); empty where `project` is false.
            outputs: what `teacher_outputs` returned for the same images.
            prefix: tokens of q and k in front of the image's N, such as a text's.

        Returns:
            Two scalars, fp32; None for the one that is off.

        Raises:
            ValueError: other numbers of layers or features than the aligner needs, shapes that do not fit.
        """
        if len(queries_keys) != len(self.student_layers):
            raise ValueError(f"queries_keys must have a pair for each of the layers {self.student_layers}, got "
                             f"{len(queries_keys)} pairs")  # fmt: skip
        if len(features) != len(outputs) * self.project:
            raise ValueError(f"features must have an entry for each of {len(outputs) * self.project} teachers, got "
                             f"{len(features)}")  # fmt: skip
        return alignment_losses(queries_keys, features, outputs, prefix=prefix)

    def weigh(self, losses: AlignmentLosses) -> Tensor:
        """proj_coeff·L_R + attn_coeff·L_A, a scalar."""
        weighted = ((self.proj_coeff, losses.feature), (self.attn_coeff, losses.attention))
        return sum(coefficient * loss for coefficient, loss in weighted if loss is not None)

    def forward(self, output: ModelOutput, images: Tensor) -> tuple[Tensor, AlignmentLosses]:
        """Both losses of a batch of one of haste's models, weighted and each by itself.

        Args:
            output: of a model that was asked for `student_layers` and, if `project`, for its projections.
            images: as for `teacher_outputs`.
        """
        outputs = self.teacher_outputs(images)
        losses = self.losses(output.queries_keys, output.projections, outputs, output.prefix)
        return self.weigh(losses), losses
