"""One run's alignment: the teachers, what they are asked, what the student is asked, and the weighted losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from haste.alignment.losses import AlignmentLosses, LayerMap, alignment_losses
from haste.models import ModelOutput
from haste.teachers.encoder import GridRule, TeacherOutput, VisionTeacher


class Aligner(nn.Module):
    """Holds the only references to the teachers, so that dropping it frees them.

    layer_map: None when attention is not aligned. The first teacher's layers are meant.
    proj_coeff, attn_coeff: weights of L_R and L_A; what has weight 0 is not computed, and nothing is kept for it.
    """

    def __init__(
        self,
        teachers: Sequence[VisionTeacher],
        layer_map: LayerMap | None,
        proj_coeff: float,
        attn_coeff: float,
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.student_layers = layer_map.student if layer_map is not None else ()
        self.proj_coeff = proj_coeff
        self.attn_coeff = attn_coeff

    @classmethod
    def from_pretrained(
        cls,
        names: Sequence[str],
        layer_map: LayerMap | None,
        grid: int,
        proj_coeff: float,
        attn_coeff: float,
        image_size: int | None = None,
        grid_rule: GridRule = "match",
    ) -> Aligner:
        """Load the teachers for a student of grid x grid tokens; each keeps only what the losses call for.

        image_size, grid_rule: the pixels per side that the teachers see, and what to do where their grid is not the
        student's; see VisionTeacher.
        """
        features = proj_coeff != 0
        if not features:
            names = names[:1]  # the others would have nothing to do
        teachers = [
            VisionTeacher.from_pretrained(
                name,
                layers=layer_map.teacher if layer_map is not None and index == 0 else (),
                grid=grid,
                image_size=image_size,
                features=features,
                grid_rule=grid_rule,
            )
            for index, name in enumerate(names)
        ]
        return cls(teachers, layer_map, proj_coeff, attn_coeff)

    @property
    def project(self) -> bool:
        """Whether the student's projections are needed."""
        return self.proj_coeff != 0

    @property
    def z_dims(self) -> tuple[int, ...]:
        """The widths that the student's projectors must have, one per teacher; empty without L_R."""
        return tuple(teacher.width for teacher in self.teachers) if self.project else ()

    def describe(self, num_heads: int) -> str:
        """Who teaches a student of so many heads, and what is done where the two differ, in one line."""
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

    def ask(self, images: Tensor) -> list[TeacherOutput]:
        """What every teacher says about the images (B, C, H, W) in [-1, 1]."""
        return [teacher(images) for teacher in self.teachers]

    def losses(self, output: ModelOutput, lessons: Sequence[TeacherOutput]) -> AlignmentLosses:
        """The losses for which the student was asked what they need, without their weights."""
        return alignment_losses(output, lessons)

    def weigh(self, losses: AlignmentLosses) -> Tensor:
        """proj_coeff·L_R + attn_coeff·L_A."""
        terms = []
        if losses.feature is not None:
            terms.append(self.proj_coeff * losses.feature)
        if losses.attention is not None:
            terms.append(self.attn_coeff * losses.attention)
        return sum(terms)

    def forward(self, output: ModelOutput, images: Tensor) -> tuple[Tensor, AlignmentLosses]:
        """Returns (proj_coeff·L_R + attn_coeff·L_A, the two losses), for the images (B, C, H, W) in [-1, 1]."""
        losses = self.losses(output, self.ask(images))
        return self.weigh(losses), losses
