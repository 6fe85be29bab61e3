"""The families of vision transformers in transformers that can be teachers, and the short names of teachers.

A family is the `model_type` of a config. A new one is one line here and one case in the tests; so is a short name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from haste.errors import UserError


class Normalisation(NamedTuple):
    """Mean and standard deviation of pixels in [0, 1], per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
INSIDE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the encoder normalises


@dataclass(frozen=True)
class Family:
    """How to run a family of encoders.

    Args:
        class_tokens: number of class and distillation tokens in front of the patches.
        normalisation: of the published weights; that of a checkpoint's own file takes precedence.
        registers: register tokens follow the class token.
        prefix: what the config calls the number of all tokens in front of the patches, where it varies.
        hub_normalisation_is_wrong: the published checkpoints' file has transformers' default, HALF, by mistake.
        resamples: forward() must be told that the images may have another size than the config's.
        unused_norm: the final norm, if REPA compares the tokens before it.
        masks_patches: the encoder drops random patches unless told to keep all, in order (MAE).
        takes_patches: the encoder takes patches of images of any shape instead of images (NaFlex).
        pools_class_token: the final norm is applied to the class token alone, which is the pooler's output.
    """

    class_tokens: int
    normalisation: Normalisation
    registers: bool = False
    prefix: str | None = None
    hub_normalisation_is_wrong: bool = False
    resamples: bool = True
    unused_norm: str | None = None
    masks_patches: bool = False
    takes_patches: bool = False
    pools_class_token: bool = False

    def prefix_tokens(self, config: PretrainedConfig) -> int:
        """The number of class and register tokens in front of the patches."""
        if self.prefix is not None:
            return getattr(config, self.prefix)
        return self.class_tokens + (config.num_register_tokens if self.registers else 0)

    def forward_arguments(self, images: Tensor, num_patches: int) -> dict[str, object]:
        """Keyword arguments of the encoder's forward() besides the pixels."""
        if self.takes_patches:
            return {"pixel_attention_mask": None, "spatial_shapes": None}
        arguments: dict[str, object] = {"interpolate_pos_encoding": True} if self.resamples else {}
        if self.masks_patches:  # patches are kept in ascending order of this noise
            order = torch.arange(num_patches, device=images.device, dtype=torch.float32)
            arguments["noise"] = order.expand(images.shape[0], -1)
        return arguments

    def strip(self, encoder: nn.Module) -> None:
        """Remove poolers and an unused norm, which neither patch tokens nor attention need."""
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        if getattr(encoder, "use_head", False):
            encoder.use_head = False
            del encoder.head
        if self.unused_norm is not None:
            setattr(encoder, self.unused_norm, nn.Identity())
        if self.masks_patches:
            encoder.config.mask_ratio = 0.0


FAMILIES: dict[str, Family] = {
    "dinov2": Family(1, IMAGENET, resamples=False),
    "dinov2_with_registers": Family(1, IMAGENET, registers=True, resamples=False),
    "dinov3_vit": Family(1, IMAGENET, registers=True, resamples=False),
    "vit": Family(1, HALF),
    "deit": Family(2, IMAGENET),
    # transformers applies CLIP's last norm to the class token alone, as in CLIP's training.
    "clip_vision_model": Family(1, CLIP, pools_class_token=True),
    "siglip_vision_model": Family(0, HALF),
    "siglip2_vision_model": Family(0, HALF, takes_patches=True),
    "vit_mae": Family(1, IMAGENET, unused_norm="layernorm", masks_patches=True),
    "radio": Family(0, INSIDE, prefix="num_summary_tokens", resamples=False),
    "ijepa": Family(0, IMAGENET, hub_normalisation_is_wrong=True),
}

# Checkpoints of images and text, of which only the image side is a teacher.
VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


def require_known(name: str, model_type: object) -> None:
    """Raise UserError unless a config's model_type is a known family, or has the image side of one."""
    known = sorted({*FAMILIES, *VISION_TOWERS})
    if model_type not in known:
        raise UserError(
            f"the teacher {name} must be a model of one of the families {', '.join(known)}, got "
            f"{str(model_type)[:40]!r}"
        )


def find_family(name: str, config: PretrainedConfig) -> Family:
    """The family of the config of an image side. UserError for an unknown one."""
    require_known(name, config.model_type)
    return FAMILIES[config.model_type]


def find_layers(model: nn.Module, depth: int) -> nn.ModuleList:
    """The list of transformer layers: the only ModuleList of that length."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise RuntimeError(f"expected one list of {depth} layers in {type(model).__name__}, found {len(lists)}")
    return lists[0]


class Shape(NamedTuple):
    """The shape of an encoder in its config; image_size and patch in pixels."""

    model_type: str
    width: int
    depth: int
    patch: int
    image_size: int


class Published(NamedTuple):
    """The name of weights on the hub, and their shape."""

    hub_name: str
    shape: Shape


# Short names, the weights on the Hugging Face hub, and their Shape. REPA's and HASTE's commands use the first group.
_PUBLISHED = {
    "dinov2-vit-s": ("facebook/dinov2-small", "dinov2", 384, 12, 14, 518),
    "dinov2-vit-b": ("facebook/dinov2-base", "dinov2", 768, 12, 14, 518),
    "dinov2-vit-l": ("facebook/dinov2-large", "dinov2", 1024, 24, 14, 518),
    "dinov2-vit-g": ("facebook/dinov2-giant", "dinov2", 1536, 40, 14, 518),
    "dinov2reg-vit-s": ("facebook/dinov2-with-registers-small", "dinov2_with_registers", 384, 12, 14, 518),
    "dinov2reg-vit-b": ("facebook/dinov2-with-registers-base", "dinov2_with_registers", 768, 12, 14, 518),
    "dinov2reg-vit-l": ("facebook/dinov2-with-registers-large", "dinov2_with_registers", 1024, 24, 14, 518),
    "dinov2reg-vit-g": ("facebook/dinov2-with-registers-giant", "dinov2_with_registers", 1536, 40, 14, 518),
    "dinov1-vit-b": ("facebook/dino-vitb16", "vit", 768, 12, 16, 224),
    "clip-vit-L": ("openai/clip-vit-large-patch14", "clip_vision_model", 1024, 24, 14, 224),
    "mae-vit-l": ("facebook/vit-mae-large", "vit_mae", 1024, 24, 16, 224),
    "jepa-vit-h": ("facebook/ijepa_vith14_1k", "ijepa", 1280, 32, 14, 224),
    # iREPA's names
    "dino-vit-b": ("facebook/dino-vitb16", "vit", 768, 12, 16, 224),
    "dinov3-vit-b16": ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3_vit", 768, 12, 16, 224),
    "dinov3-vit-l16": ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3_vit", 1024, 24, 16, 224),
    "dinov3-vit-h16plus": ("facebook/dinov3-vith16plus-pretrain-lvd1689m", "dinov3_vit", 1280, 32, 16, 224),
    "dinov3-vit-7b16": ("facebook/dinov3-vit7b16-pretrain-lvd1689m", "dinov3_vit", 4096, 40, 16, 224),
    "webssl-vit-dino300m_full2b_224": ("facebook/webssl-dino300m-full2b-224", "dinov2", 1024, 24, 14, 224),
    "webssl-vit-dino1b_full2b_224": ("facebook/webssl-dino1b-full2b-224", "dinov2", 1536, 40, 14, 224),
    "webssl-vit-dino2b_full2b_224": ("facebook/webssl-dino2b-full2b-224", "dinov2", 2688, 24, 14, 224),
    "webssl-vit-dino3b_full2b_224": ("facebook/webssl-dino3b-full2b-224", "dinov2", 3072, 26, 14, 224),
    "webssl-vit-dino5b_full2b_224": ("facebook/webssl-dino5b-full2b-224", "dinov2", 3584, 32, 14, 224),
    "webssl-vit-dino7b_full8b_224": ("facebook/webssl-dino7b-full8b-224", "dinov2", 4096, 32, 14, 224),
    # newer teachers
    "dinov3-vit-s": ("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3_vit", 384, 12, 16, 224),
    "dinov3-vit-b": ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3_vit", 768, 12, 16, 224),
    "dinov3-vit-l": ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3_vit", 1024, 24, 16, 224),
    "dinov3-vit-h": ("facebook/dinov3-vith16plus-pretrain-lvd1689m", "dinov3_vit", 1280, 32, 16, 224),
    "siglip2-vit-b": ("google/siglip2-base-patch16-256", "siglip_vision_model", 768, 12, 16, 256),
    "siglip2-vit-l": ("google/siglip2-large-patch16-256", "siglip_vision_model", 1024, 24, 16, 256),
    "siglip2-vit-so": ("google/siglip2-so400m-patch16-256", "siglip_vision_model", 1152, 27, 16, 256),
    "siglip2naflex-vit-b": ("google/siglip2-base-patch16-naflex", "siglip2_vision_model", 768, 12, 16, 256),
    "siglip2naflex-vit-so": ("google/siglip2-so400m-patch16-naflex", "siglip2_vision_model", 1152, 27, 16, 256),
}
PUBLISHED = {name: Published(hub, Shape(*shape)) for name, (hub, *shape) in _PUBLISHED.items()}  # type: ignore[arg-type]

# Names of REPA and iREPA by their beginnings, and why no model of transformers has these weights.
UNAVAILABLE = {
    "mocov3-vit-": "which lacks MoCo v3; its weights can be used from a folder, saved as a ViTModel with "
    "save_pretrained()",
    "pe-vit-": "which has the Perception Encoder only through timm",
    "langpe-vit-": "which has the Perception Encoder only through timm",
    "spatialpe-vit-": "which has the Perception Encoder only through timm",
    "sam2-vit-": "with one grid of tokens in all layers, which SAM 2's encoder has not",
}


def resolve_teacher(name: str, flag: str = "--enc-type") -> str:
    """The argument of from_pretrained() for a teacher.

    Args:
        name: a short name, a folder, or a hub name.
        flag: that gave the name, for messages.

    Raises:
        UserError: a folder that is missing or has no config.json, or another name.
    """
    if name in PUBLISHED:
        return PUBLISHED[name].hub_name
    for beginning, why in UNAVAILABLE.items():
        if name.startswith(beginning) and "/" not in name and not Path(name).expanduser().is_dir():
            raise UserError(f"{flag} must be a model of transformers, {why}, got {name}")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{flag} must be a folder written by save_pretrained(), got {name}, without config.json")
        return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/"):
        return name  # on the hub
    raise UserError(
        f"{flag} must be a folder written by save_pretrained(), a hub name such as facebook/dinov2-base, or one of "
        f"{', '.join(PUBLISHED)}, got {name!r}"
    )
