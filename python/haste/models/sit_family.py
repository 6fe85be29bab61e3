"""SiT as a family: its sizes and LightningDiT's, its config, and the public trainers' checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import Family, ForeignCheckpoints, Layout, PublishedAlignment
from haste.models.layers import check_config_limits, check_sizes, size_flag
from haste.models.registry import register
from haste.models.sit import SiT
from haste.models.sit_checkpoints import CONVOLUTION, NAMES, SiTCheckpoints
from haste.models.sit_class_token import ClassTokenSiT, Joint, split
from haste.samplers import Solver
from haste.validation import build, check

SIT_SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads of the published sizes."""

SIT_MODELS = {
    f"SiT-{size}/{patch}": {**shape, "patch_size": patch} for size, shape in SIT_SIZES.items() for patch in (1, 2, 4, 8)
}
"""The published models, "SiT-S/1" to "SiT-XL/8", by the arguments that make them."""

LIGHTNINGDIT_SIZES = {
    **SIT_SIZES,
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
LIGHTNINGDIT_MODELS = {
    f"LightningDiT-{name}": {
        **LIGHTNINGDIT_SIZES[name.partition("/")[0]], "patch_size": int(name[-1]),
        "positions": "rope", "norm": "rmsnorm", "mlp": "swiglu",
    }
    for name in ("B/1", "B/2", "L/2", "XL/1", "XL/2", "1p0B/1", "1p0B/2", "1p6B/1", "1p6B/2")
}  # fmt: skip
"""LightningDiT's published models (arXiv 2501.01423): SiT with all switches on."""


@dataclass(frozen=True)
class _Config:
    """The arguments of SiT that a checkpoint holds: all but z_dims. Raises UserError for sizes that no SiT has."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int
    num_classes: int
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    qk_norm: bool = False
    positions: Literal["sincos", "rope"] = "sincos"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    fused_attn: bool = True
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    encoder_depth: int = 8
    projector_dim: int = 2048
    projection_layer_type: Literal["mlp", "conv", "sra"] = "mlp"
    cls_token_dim: int = 0

    def __post_init__(self) -> None:
        check_config_limits(self, LARGEST)
        if not 0 <= self.cls_token_dim <= WIDEST_TOKEN:
            raise UserError(f"cls_token_dim of its model must be from 0 to {WIDEST_TOKEN}, got {self.cls_token_dim}")


# Far above what anybody trains, and far below what no machine can hold.
LARGEST = {
    "input_size": 8192, "patch_size": 1024, "in_channels": 4096, "hidden_size": 16_384, "depth": 200,
    "num_heads": 1024, "num_classes": 10_000_000, "encoder_depth": 200, "projector_dim": 65_536,
}  # fmt: skip

# The arguments that are not the default, and the weight that shows it.
SWITCHES = (
    ("positions", "rope", "feat_rope.freqs_cos"),
    ("norm", "rmsnorm", "blocks.0.norm1.weight"),
    ("mlp", "swiglu", "blocks.0.mlp.w12.weight"),
)
WIDEST_TOKEN = 65_536  # of a class token; 0: there is none

# HASTE (arXiv 2505.16792), for DINOv2-B: the same layers at 256 and 512 pixels. S is not in the paper; it is as deep
# as B.
DEEP = PublishedAlignment("4:8,5:9,6:10,7:11", encoder_depth=8)
PUBLISHED_ALIGNMENT = {
    "SiT-S": PublishedAlignment("", encoder_depth=5),
    "SiT-B": PublishedAlignment("2:7,3:9,4:11", encoder_depth=5),
    "SiT-L": DEEP,
    "SiT-XL": DEEP,
}


class SiTFamily(Family):
    """SiT, conditioned on a class."""

    name = "sit"
    title = "SiT"
    module: type[SiT] = SiT
    with_class_token: type[ClassTokenSiT] | None = ClassTokenSiT
    settings: Mapping[str, Any] = {"positions": "sincos", "norm": "layernorm", "mlp": "gelu", "cls_coeff": 0.0}
    published_alignment = PUBLISHED_ALIGNMENT
    foreign: ForeignCheckpoints = SiTCheckpoints()
    sizes = {
        **SIT_MODELS,
        **LIGHTNINGDIT_MODELS,
        # 8 x 8 pixels as 16 tokens: small enough for two processor cores.
        "SiT-Digits/2": {"depth": 6, "hidden_size": 96, "num_heads": 4, "patch_size": 2},
    }

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> SiT:
        own = {name: value for name, value in config.items() if name != "cls_token_dim"}
        width = config.get("cls_token_dim", 0)
        if not width:
            return self.module(**own, z_dims=z_dims)
        if self.with_class_token is None:
            raise UserError(f"cls_token_dim must be 0 for {self.title}, which denoises no class token, got {width}")
        return self.with_class_token(cls_token_dim=width, **own, z_dims=z_dims)

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        check_sizes({**size, "input_size": data.input_size}, size_flag)
        return {
            **size,
            "input_size": data.input_size,
            "in_channels": data.channels,
            "num_classes": data.num_classes,
            "class_dropout_prob": settings.cfg_prob,
            "qk_norm": settings.qk_norm,
            "fused_attn": settings.fused_attn,
            "attention": settings.attention,
            "encoder_depth": settings.encoder_depth,
            "projector_dim": settings.projector_dim,
            "projection_layer_type": settings.projector_kind,
        }

    def checked(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        given = asdict(build(_Config, config, f"model_config of {source}"))
        return {field.name: given[field.name] for field in fields(_Config) if field.name in config}

    def check_start(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        for name in (*(name for name, *_ in SWITCHES), "qk_norm"):  # the class token is the trainer's to check
            only = other.get(name, self.settings.get(name, False))
            if config[name] != only:
                raise UserError(f"--{name.replace('_', '-')} must be {only}, as of the model of --init-from, got "
                                f"{config[name]}")  # fmt: skip

    def layout(self, config: Mapping[str, Any]) -> Layout:
        side, channels = config["input_size"], config["in_channels"]
        grid = side // config["patch_size"]
        return Layout((channels, side, side), grid, config["depth"], config["num_heads"], config["num_classes"],
                      class_token=config.get("cls_token_dim", 0))  # fmt: skip

    def for_sampling(self, config: Mapping[str, Any], fused_attn: bool = True) -> dict[str, Any]:
        return {**config, "attention": "sdpa", "fused_attn": fused_attn}  # sdpa is everywhere

    def training_flops(self, config: Mapping[str, Any]) -> int:
        """Those of the matrix products: forward, and twice that for backward."""
        width, patch = config["hidden_size"], config["patch_size"]
        tokens = (config["input_size"] // patch) ** 2
        token = config.get("cls_token_dim", 0)
        tokens += bool(token)
        hidden, layers = int(width * config.get("mlp_ratio", 4.0)), 2
        if config.get("mlp") == "swiglu":
            hidden, layers = int(2 / 3 * hidden), 3
        block = tokens * (4 * width + layers * hidden) * width + 2 * tokens * tokens * width + 6 * width * width
        ends = (1 + self.module.outputs) * tokens * patch * patch * config["in_channels"] * width + 2 * token * width
        return 3 * 2 * (config["depth"] * block + ends)

    # ---- the class token, if the model has one ----

    def interpolate(self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Any]:
        x_t, target = super().interpolate(model, x, noise, t, path)
        return x_t, split(target, model.image_shape) if isinstance(model, ClassTokenSiT) else target

    def loss(self, predicted: Tensor, target: Any) -> Tensor:
        if isinstance(target, Joint):
            predicted, target = split(predicted, target.image.shape[1:]).image, target.image
        return super().loss(predicted, target)

    def class_token_loss(self, predicted: Tensor, target: Any) -> Tensor | None:
        if not isinstance(target, Joint):
            return None
        return super().loss(split(predicted, target.image.shape[1:]).token, target.token)

    def sample(self, model: nn.Module, noise: Tensor, condition: Tensor, solve: Solver) -> Tensor:
        shape = getattr(model, "image_shape", None)  # of a model with a class token, or of the cache around it
        if shape is None:
            return super().sample(model, noise, condition, solve)
        observe = solve.observe
        if observe is not None:
            solve = replace(solve, observe=lambda step, state: observe(step, split(state, shape).image))
        return split(solve(model, noise, condition), shape).image

    # ---- sampling ----

    def null(self, model: nn.Module) -> Tensor | None:
        return None if model.null_label is None else torch.tensor(model.null_label)

    def cached(self, model: nn.Module) -> SiT:
        return model

    def infer_config(self, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any] | None:
        if not all(name in weights for name in NAMES):
            return None
        weights = self.foreign.rename(weights)
        for name, dims in zip(NAMES, (3, 4, 2), strict=True):
            if weights[name].dim() != dims:
                raise UserError(
                    f"the weights are not those of a {self.title}: {name} has shape {tuple(weights[name].shape)}"
                )
        modulation = weights.get("blocks.0.adaLN_modulation.1.bias")
        if modulation is not None and len(modulation) == 4 * weights[NAMES[1]].shape[0]:
            raise UserError("the weights are a LightningDiT trained with wo_shift, whose blocks have no shifts")
        token = weights.get("cls_projectors2.weight")
        (_, tokens, width), (_, channels, patch, _), (rows, _) = (weights[name].shape for name in NAMES)
        numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        depth = sum(number.isdecimal() for number in numbers)
        switches = {name: value for name, value, weight in SWITCHES if weight in weights}
        heads = {s["num_heads"] for s in self.sizes.values() if (s["depth"], s["hidden_size"]) == (depth, width)}
        if not heads:
            raise UserError(
                f"the weights are a {self.title} of depth {depth} and width {width}, which none of the known sizes has"
            )
        projector = weights.get("projectors.0.0.weight")
        num_classes = check(args.get("num_classes"), int | None, "num_classes of its settings") or rows - 1
        if rows - num_classes not in (0, 1):
            raise UserError(f"its table of labels has {rows} rows, which fits no model of {num_classes} classes")
        encoder_depth = check(args.get("encoder_depth"), int | None, "encoder_depth of its settings") or 8
        return {
            "depth": depth,
            "hidden_size": width,
            "num_heads": heads.pop(),
            "patch_size": patch,
            "input_size": math.isqrt(tokens - (token is not None)) * patch,
            "in_channels": channels,
            "num_classes": num_classes,
            "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
            **switches,
            "encoder_depth": min(encoder_depth, depth),
            "projector_dim": 2048 if projector is None or not projector.dim() else len(projector),
            "projection_layer_type": "conv" if CONVOLUTION in weights else "mlp",
            **({} if token is None else {"cls_token_dim": token.shape[-1]}),
        }


register(SiTFamily())
