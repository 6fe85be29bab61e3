"""The teachers of a run, or its own EMA, and the losses that align its model with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haste.alignment import Aligner, choose_layer_map
from haste.alignment.self_alignment import SelfAligner
from haste.data import TrainingData
from haste.errors import UserError
from haste.models import get_family
from haste.registry import TEACHERS, plugin
from haste.training.config import TrainConfig


def build_aligner(config: TrainConfig, model_config: dict[str, Any], ended: bool = False) -> Aligner | None:
    """The teachers and the losses; None if nothing is aligned, or alignment has ended, and no class token denoised."""
    if config.sra_coeff and not ended:
        width = model_config["hidden_size"]
        return SelfAligner(config.sra_coeff, config.block_out_t or 0, width, config.path_type, config.seed)
    if not config.teachers or (ended and not config.has_class_token):
        return None
    folder = Path(config.output_dir).expanduser() / "teachers"
    names = [str(plugin(TEACHERS, name).prepare(folder)) if name in TEACHERS else name for name in config.teachers]
    return Aligner.from_pretrained(
        names,
        layer_map=choose_layer_map(config.layer_map, config.model) if config.aligns_attention else None,
        grid=get_family(model_config).layout(model_config).grid,
        proj_coeff=0 if ended else config.proj_coeff,
        attn_coeff=0 if ended else config.attn_coeff,
        image_size=config.teacher_resolution,
        grid_rule=config.teacher_grid,
        zscore_alpha=config.zscore_alpha if config.spnorm_method == "zscore" else None,
        class_token=config.has_class_token,
    )


def check_channels(config: TrainConfig, dataset: TrainingData, aligner: Aligner) -> None:
    """Raise UserError if a teacher takes images of another number of channels than the data has."""
    for name, teacher in zip(config.teachers, aligner.teachers, strict=True):
        if not teacher.takes(dataset.image_channels):
            raise UserError(
                f"--enc-type must be a teacher of images with {dataset.image_channels} channels, as those of "
                f"--data-dir {config.data_dir}, got {name}, whose images have {teacher.num_channels}"
            )
