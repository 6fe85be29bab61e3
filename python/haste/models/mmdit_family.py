"""MM-DiT as a family: its sizes, its config, its condition, and the public trainers' checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import Family, Layout, PublishedAlignment
from haste.models.layers import check_config_limits, check_sizes, size_flag
from haste.models.mmdit import MMDiT
from haste.models.registry import register
from haste.validation import build, check

MMDIT_SIZES = {"MM-DiT-COCO": {"depth": 24, "hidden_size": 768, "num_heads": 24, "patch_size": 2}}
"""The published model."""

# Far above what anybody trains, and far below what no machine can hold.
LARGEST = {
    "input_size": 8192, "patch_size": 1024, "in_channels": 4096, "hidden_size": 16_384, "depth": 200, "num_heads": 1024,
    "context_tokens": 2**16, "context_width": 2**16, "encoder_depth": 200, "projector_dim": 65_536,
}  # fmt: skip


@dataclass(frozen=True)
class _Config:
    """The arguments of MMDiT that a checkpoint holds: all but z_dims. Raises UserError for sizes that no MM-DiT has."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int
    context_tokens: int
    context_width: int
    mlp_ratio: float = 4.0
    fused_attn: bool = True
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    encoder_depth: int = 8
    projector_dim: int = 2048
    projection_layer_type: Literal["mlp", "conv", "sra"] = "mlp"

    def __post_init__(self) -> None:
        check_config_limits(self, LARGEST)


# Other names of the arguments, by which the public model is described, and what must not be there.
PUBLIC = {"width": "hidden_size", "heads": "num_heads", "channels": "in_channels", "projector_width": "projector_dim"}
IMPLIED = ("family", "head_dim", "grid", "z_dims")  # which follow from others, or are given apart
ABSENT = ("qk_norm", "pooled_text")

HEAD, TEXT_TOKENS = 32, 77  # of the published model (its texts are CLIP's), which weights alone do not tell
NAMES = ("pos_embed", "x_embedder.proj.weight", "context_embedder.weight", "joint_blocks.0.x_block.attn.qkv.weight")


class MMDiTFamily(Family):
    """MM-DiT, conditioned on the features of a text."""

    name = "mmdit"
    title = "MM-DiT"
    published_alignment = {"MM-DiT-COCO": PublishedAlignment("4:8,5:9,6:10,7:11", encoder_depth=8)}
    sizes = {
        **MMDIT_SIZES,
        # 8 x 8 pixels as 16 tokens: small enough for two processor cores.
        "MM-DiT-Digits": {"depth": 6, "hidden_size": 96, "num_heads": 4, "patch_size": 2},
    }

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> MMDiT:
        return MMDiT(**_own_names(config), z_dims=z_dims or config.get("z_dims", ()))

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        check_sizes({**size, "input_size": data.input_size}, size_flag)
        if data.text is None:
            raise UserError(f"--data-dir must hold captions for {self.title}, got {settings.data_dir}, whose images "
                            "have none; see haste prepare --captions")  # fmt: skip
        if settings.qk_norm:
            raise UserError("--qk-norm must be left out for MM-DiT, whose published models have none, got True")
        return {
            **size,
            "input_size": data.input_size,
            "in_channels": data.channels,
            "context_tokens": data.text.tokens,
            "context_width": data.text.width,
            "fused_attn": settings.fused_attn,
            "attention": settings.attention,
            "encoder_depth": settings.encoder_depth,
            "projector_dim": settings.projector_dim,
            "projection_layer_type": settings.projector_kind,
        }

    def checked(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        own = _own_names(config)
        given = asdict(build(_Config, own, f"model_config of {source}"))
        return {name: value for name, value in given.items() if name in own}

    def check_start(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        own, found = (_own_names(each)["context_width"] for each in (config, other))
        if own != found:
            raise UserError(f"--data-dir must have text features of width {found}, as the model of --init-from, got "
                            f"{own}")  # fmt: skip

    def layout(self, config: Mapping[str, Any]) -> Layout:
        own = _own_names(config)
        side, grid = own["input_size"], own["input_size"] // own["patch_size"]
        return Layout((own["in_channels"], side, side), grid, own["depth"], own["num_heads"], num_classes=None,
                      condition_shape=(own["context_tokens"], own["context_width"]))  # fmt: skip

    def for_sampling(self, config: Mapping[str, Any], fused_attn: bool = True) -> dict[str, Any]:
        return {**config, "attention": "sdpa", "fused_attn": fused_attn}  # sdpa is everywhere

    def training_flops(self, config: Mapping[str, Any]) -> int:
        """Those of the matrix products: forward, and twice that for backward."""
        own = _own_names(config)
        width, patch, depth = own["hidden_size"], own["patch_size"], own["depth"]
        image, text = (own["input_size"] // patch) ** 2, own["context_tokens"]
        every_token, joint = (4 + 2 * own.get("mlp_ratio", 4.0)) * width * width, 2 * (image + text) ** 2 * width
        blocks = depth * ((image + text) * every_token + joint + 12 * width * width)
        spared = text * (1 + 2 * own.get("mlp_ratio", 4.0)) * width * width + 4 * width * width  # by the last text
        ends = 2 * image * patch * patch * own["in_channels"] * width + text * own["context_width"] * width
        return round(3 * 2 * (blocks - spared + ends))

    # ---- the condition ----

    def set_null(self, model: nn.Module, null: Tensor | None) -> None:
        model.null_context = null

    def null(self, model: nn.Module) -> Tensor | None:
        return model.null_context

    def cached(self, model: nn.Module) -> MMDiT:
        return model

    # ---- files of others ----

    def infer_config(self, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any] | None:
        if not all(name in weights for name in NAMES):
            return None
        for name, dims in zip(NAMES, (3, 4, 2, 2), strict=True):
            if weights[name].dim() != dims:
                shape = tuple(weights[name].shape)
                raise UserError(f"the weights are not those of an MM-DiT: {name} has shape {shape}")
        (_, tokens, width), (_, channels, patch, _), (_, context_width) = (weights[name].shape for name in NAMES[:3])
        numbers = {name.split(".")[1] for name in weights if name.startswith("joint_blocks.")}
        projector = weights.get("projectors.0.0.weight")
        depth = sum(number.isdecimal() for number in numbers)
        shape = (depth, width, patch)
        known = (s for s in self.sizes.values() if shape == (s["depth"], s["hidden_size"], s["patch_size"]))
        heads = next((size["num_heads"] for size in known), width // HEAD)
        encoder_depth = check(args.get("encoder_depth"), int | None, "encoder_depth of its settings") or 8
        return {
            "depth": depth,
            "hidden_size": width,
            "num_heads": max(heads, 1),
            "patch_size": patch,
            "input_size": math.isqrt(tokens) * patch,
            "in_channels": channels,
            "context_tokens": TEXT_TOKENS,
            "context_width": context_width,
            "encoder_depth": min(encoder_depth, depth),
            "projector_dim": 2048 if projector is None or not projector.dim() else len(projector),
        }


def _own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that may describe the public model by other names, as MMDiT's arguments."""
    own = {PUBLIC.get(name, name): value for name, value in config.items() if name not in (*IMPLIED, *ABSENT)}
    if "grid" in config:
        own["input_size"] = config["grid"] * config["patch_size"]
    unknown = own.keys() - _Config.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(_Config.__dataclass_fields__)
        raise UserError(f"config of an MM-DiT must have names of {known}, got {min(unknown)}")
    for name in ABSENT:
        if config.get(name):
            raise UserError(f"{name} of an MM-DiT must be left out, as the published models have none, got "
                            f"{config[name]}")  # fmt: skip
    return own


register(MMDiTFamily())
