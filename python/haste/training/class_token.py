"""The class token that a run denoises along with its images (REG, arXiv 2507.01467): its width, and from where it may
start.

The loss is the trainer's, L_v + cls_coeff·L_cls, the model `haste.models.sit_class_token`, the teacher's part
`haste.alignment.Aligner.with_class_token`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haste.alignment import Aligner
from haste.errors import UserError
from haste.training.config import TrainConfig

WIDTH = "cls_token_dim"  # in a model's config, as the public model calls it


def check_start(config: TrainConfig, found: Mapping[str, Any]) -> None:
    """Raise UserError if one of two models has a class token and the other has none.

    Args:
        found: the config of the model that --init-from holds.
    """
    if config.has_class_token and not found.get(WIDTH):
        raise UserError(f"--cls-coeff must be 0 for a model of --init-from without a class token, got "
                        f"{config.cls_coeff:g}")  # fmt: skip
    if not config.has_class_token and found.get(WIDTH):
        raise UserError(
            "--cls-coeff must be above 0 for a model of --init-from with a class token, such as 0.03, got 0"
        )


def with_class_token(
    model_config: dict[str, Any], aligner: Aligner, initial: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The config of a new run's model, with the width of the class token that the first teacher returns, if it does.

    Args:
        initial: the checkpoint that is resumed or started from.

    Raises:
        UserError: that one's class token has another width.
    """
    if not aligner.class_token:
        return model_config
    width = aligner.teachers[0].width
    found = width if initial is None else initial["model_config"].get(WIDTH)
    if found != width:
        raise UserError(f"--enc-type must be a teacher with class tokens of width {found}, as the model to start from, "
                        f"got {aligner.teachers[0].name} of width {width}")  # fmt: skip
    return {**model_config, WIDTH: width}
