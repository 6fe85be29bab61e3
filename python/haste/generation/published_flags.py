"""The flags of REPA's generate.py that describe a checkpoint. Here the checkpoint knows; the flags must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from haste.errors import UserError

if TYPE_CHECKING:  # flags are checked without torch
    from haste.models.sit import SiT

# What a bare file of weights does not tell.
ASSUMED = ("num_classes", "encoder_depth", "path_type")


@dataclass(kw_only=True)
class PublishedFlags:
    """Not needed; accepted so that published commands run, and refused where the checkpoint is another."""

    model: str | None = None
    """The student's size and patch, such as SiT-XL/2."""
    num_classes: int | None = None
    """Classes that the student knows."""
    encoder_depth: int | None = None
    """The block, counted from 1, whose tokens were compared with the teacher's."""
    resolution: int | None = None
    """Pixels per side of the pictures."""
    qk_norm: bool = False
    """The student normalises queries and keys."""
    projector_embed_dims: str | None = None
    """Widths of the teachers, with commas between them."""
    path_type: Literal["linear", "cosine"] | None = None
    """How data turned into noise. A bare file of weights does not tell; then the default is linear."""
    legacy: bool = False
    """Has no effect: checkpoints with REPA's older names are known by those names."""

    def assumed(self) -> dict[str, Any]:
        """The settings to go by where a checkpoint has none."""
        return {name: getattr(self, name) for name in ASSUMED if getattr(self, name) is not None}

    def refuse_other(self, model: SiT, recorded: dict[str, Any], factor: int) -> None:
        """UserError, naming the flag, if one says what the checkpoint is not. What it does not tell is not compared.

        recorded: of the student. factor: pixels per value of what it draws.
        """
        settings = recorded.get("args", {})
        dims = ",".join(map(str, recorded.get("z_dims", ()))) or None
        found = {
            "model": name_of(model),
            "num_classes": model.num_classes,
            "encoder_depth": settings.get("encoder_depth"),
            "resolution": model.input_size * factor,
            "projector_embed_dims": dims,
            "path_type": settings.get("path_type"),
        }
        for name, value in found.items():
            given = getattr(self, name)
            given = given.replace(" ", "") if name == "projector_embed_dims" and given else given
            if None not in (given, value) and given != value:
                raise UserError(f"--{name.replace('_', '-')} is {given}; it must be {value}, as the checkpoint has it")
        if self.qk_norm and "blocks.0.attn.q_norm.weight" not in model.state_dict():
            raise UserError("--qk-norm is given, and the checkpoint's attention has no such norm; leave it out")


def name_of(model: SiT) -> str:
    """SiT-XL/2 and the like; a description of a model that has no name."""
    from haste.training.students import STUDENTS

    shape = {
        "depth": len(model.blocks),
        "hidden_size": model.pos_embed.shape[-1],
        "num_heads": model.blocks[0].attn.num_heads,
        "patch_size": model.patch_size,
    }
    names = [name for name, known in STUDENTS.items() if known == shape]
    return names[0] if names else f"a SiT of {', '.join(f'{key} {value}' for key, value in shape.items())}"
