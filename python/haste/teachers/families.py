"""What differs between the families of vision transformers in transformers.

A family is known by its config's `model_type`. Adding one is one line here and one case in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from haste.errors import UserError


class Normalisation(NamedTuple):
    """What pixels in [0, 1] lose and are divided by, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """How to run one family of encoders.

    prefix_tokens: number of leading class and register tokens, from the config.
    normalisation: what the published weights were trained with; a checkpoint's own file comes first.
    hub_normalisation_is_wrong: the published checkpoints' file holds transformers' default, HALF, by mistake.
    resamples: forward() must be told that the pictures may have another size than the config says.
    unused_norm: the final norm, if REPA compares the tokens before it.
    masks_patches: the encoder drops random patches unless told to keep them all, in order (MAE).
    takes_patches: the encoder takes patches of pictures of any shape (NaFlex) instead of pictures.
    """

    prefix_tokens: Callable[[PretrainedConfig], int]
    normalisation: Normalisation
    hub_normalisation_is_wrong: bool = False
    resamples: bool = True
    unused_norm: str | None = None
    masks_patches: bool = False
    takes_patches: bool = False

    def forward_arguments(self, images: Tensor, num_patches: int) -> dict[str, object]:
        """Keyword arguments of the model's forward() beside the pixels."""
        if self.takes_patches:
            return {"pixel_attention_mask": None, "spatial_shapes": None}
        arguments: dict[str, object] = {"interpolate_pos_encoding": True} if self.resamples else {}
        if self.masks_patches:  # patches are kept in ascending order of this noise
            order = torch.arange(num_patches, device=images.device, dtype=torch.float32)
            arguments["noise"] = order.expand(images.shape[0], -1)
        return arguments

    def strip(self, encoder: nn.Module) -> None:
        """Take out what neither patch tokens nor attention come from: poolers, and a norm that is not wanted."""
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        if getattr(encoder, "use_head", False):
            encoder.use_head = False
            del encoder.head
        if self.unused_norm is not None:
            setattr(encoder, self.unused_norm, nn.Identity())
        if self.masks_patches:
            encoder.config.mask_ratio = 0.0


def _no_prefix(config: PretrainedConfig) -> int:
    return 0


def _class_token(config: PretrainedConfig) -> int:
    return 1


def _class_and_distillation(config: PretrainedConfig) -> int:
    return 2


def _class_and_registers(config: PretrainedConfig) -> int:
    return 1 + config.num_register_tokens


FAMILIES: dict[str, Family] = {
    "dinov2": Family(_class_token, IMAGENET, resamples=False),
    "dinov2_with_registers": Family(_class_and_registers, IMAGENET, resamples=False),
    "dinov3_vit": Family(_class_and_registers, IMAGENET, resamples=False),
    "vit": Family(_class_token, HALF),
    "deit": Family(_class_and_distillation, IMAGENET),
    # transformers applies CLIP's last norm to the class token alone, as in CLIP's training.
    "clip_vision_model": Family(_class_token, CLIP),
    "siglip_vision_model": Family(_no_prefix, HALF),
    "siglip2_vision_model": Family(_no_prefix, HALF, takes_patches=True),
    "vit_mae": Family(_class_token, IMAGENET, unused_norm="layernorm", masks_patches=True),
    "ijepa": Family(_no_prefix, IMAGENET, hub_normalisation_is_wrong=True),
}

# Two-tower checkpoints, of which only the picture side is a teacher.
VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


def require_known(name: str, model_type: object) -> None:
    """UserError if a config's model_type is none whose vision side is a known family."""
    known = sorted(set(FAMILIES) | set(VISION_TOWERS))
    if model_type not in known:
        raise UserError(
            f"the teacher {name} is a {str(model_type)[:40]!r} model; a teacher must be one of {', '.join(known)}"
        )


def find_family(name: str, config: PretrainedConfig) -> Family:
    """The family of a vision config; UserError if its model_type is not a known one."""
    if config.model_type not in FAMILIES:
        require_known(name, None)
    return FAMILIES[config.model_type]


def find_layers(model: nn.Module, depth: int) -> nn.ModuleList:
    """The list of transformer layers: the one ModuleList that is as long as the config says the encoder is deep."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise RuntimeError(f"expected one list of {depth} layers in {type(model).__name__}, found {len(lists)}")
    return lists[0]
