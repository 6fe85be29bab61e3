"""What differs between the families of vision transformers in transformers.

A family is known by its config's `model_type`. Adding one is one line here and one case in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from haste.errors import UserError


@dataclass(frozen=True)
class Family:
    """How to run one family of encoders.

    prefix_tokens: number of leading class and register tokens, from the config.
    resample: keyword arguments of forward() that resample the positions to another grid; some families always do it.
    final_norm: name of a norm that the model leaves to its pooler and that the patch tokens still need.
    masks_patches: the encoder drops random patches unless told to keep them all, in order (MAE).
    """

    prefix_tokens: Callable[[PretrainedConfig], int]
    resample: bool = True
    final_norm: str | None = None
    masks_patches: bool = False

    def forward_arguments(self, images: torch.Tensor, num_patches: int) -> dict[str, object]:
        """Keyword arguments of the model's forward() beside the pixels."""
        arguments: dict[str, object] = {"interpolate_pos_encoding": True} if self.resample else {}
        if self.masks_patches:  # patches are kept in ascending order of this noise
            order = torch.arange(num_patches, device=images.device, dtype=torch.float32)
            arguments["noise"] = order.expand(images.shape[0], -1)
        return arguments


def _class_token(config: PretrainedConfig) -> int:
    return 1


def _no_prefix(config: PretrainedConfig) -> int:
    return 0


def _class_and_registers(config: PretrainedConfig) -> int:
    return 1 + config.num_register_tokens


def _class_and_distillation(config: PretrainedConfig) -> int:
    return 2


FAMILIES: dict[str, Family] = {
    "vit": Family(_class_token),
    "deit": Family(_class_and_distillation),
    "dinov2": Family(_class_token, resample=False),
    "dinov2_with_registers": Family(_class_and_registers, resample=False),
    "dinov3_vit": Family(_class_and_registers, resample=False),  # rotary: any grid
    "clip_vision_model": Family(_class_token, final_norm="post_layernorm"),
    "siglip_vision_model": Family(_no_prefix),
    "vit_mae": Family(_class_token, masks_patches=True),
    "ijepa": Family(_no_prefix),
}

# Two-tower checkpoints, of which only the picture side is a teacher.
VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def find_family(name: str, config: PretrainedConfig) -> Family:
    """The family of a vision config; UserError if its model_type is not a known one."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(set(FAMILIES) | set(VISION_TOWERS)))
        raise UserError(f"the teacher {name} is a {config.model_type!r} model; a teacher must be one of {known}")
    return family


def find_layers(model: nn.Module, depth: int) -> nn.ModuleList:
    """The list of transformer layers: the one ModuleList that is as long as the config says the encoder is deep."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise RuntimeError(f"expected one list of {depth} layers in {type(model).__name__}, found {len(lists)}")
    return lists[0]
