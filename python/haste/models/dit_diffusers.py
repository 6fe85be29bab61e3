"""A DiT as diffusers' DiTTransformer2DModel, and the reverse: names, shapes, sizes.

The two compute the same, but for what is treated here:

- every block there has its own copy of the embedders of times and classes, and q, k and v are three layers;
- times are embedded with other frequencies (`haste.models.dit_times`);
- DiTPipeline takes class 1000 for none whatever the model, so a table of fewer classes is padded: its null class is
  row 1000, and the rows between are copies of it; a model that has none gets NaN there, as guidance needs one;
- `norm_eps` of published folders is 1e-5 and concerns one of a block's two norms; DiT has 1e-6, which is written here.

What of this a folder has is kept under "_haste" in the transformer's config.json, where diffusers leaves it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from haste.errors import UserError
from haste.models.dit_times import NAMES as TIMES
from haste.models.dit_times import FittedTimes, fit_times
from haste.models.family import Weights
from haste.models.layers import sincos_positions
from haste.validation import build, shown

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in folders of older versions
NULL_CLASS = 1000  # of DiTPipeline

# Layers by DiT's name and by diffusers'. Those of SHARED are one in DiT, and one in each block there.
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed.pos_embed"  # which older versions store, and all compute

THEIR_BLOCK = re.compile(r"transformer_blocks\.(\d{1,4})\.(.+)\.(weight|bias)")


def is_transformer(weights: Mapping[str, Any]) -> bool:
    """Whether weights are by the names of diffusers' DiT."""
    return "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" in weights


# ---- to diffusers ----


def to_diffusers(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], fit: bool = True
) -> tuple[Weights, dict[str, Any], FittedTimes | None]:
    """The weights and the config of a DiTTransformer2DModel.

    Args:
        weights: of a DiT, without projectors.
        config: its model_config.
        fit: fit the embedding of times to diffusers' frequencies; False leaves it as it is, as published folders have
            it.

    Returns:
        Weights that share no memory, the content of config.json, and how well times were fitted (None if not).

    Raises:
        UserError: a model that diffusers cannot compute; names what it must be.
    """
    _check_known_there(weights, config)
    ours = {name: value for name, value in weights.items() if name != "pos_embed"}
    fitted = fit_times(ours, "dit", "diffusers") if fit else None
    if fitted is not None:
        ours.update(fitted.weights)
    null = len(ours[TABLE]) > config["num_classes"]
    ours[TABLE] = _padded(ours[TABLE], config["num_classes"], null)
    theirs: Weights = {}
    for name, value in ours.items():
        layer, _, kind = name.rpartition(".")
        if layer in ENDS:
            theirs[f"{ENDS[layer]}.{kind}"] = value.clone()
        elif layer in SHARED:
            for number in range(config["depth"]):
                theirs[f"transformer_blocks.{number}.{SHARED[layer]}.{kind}"] = value.clone()
        else:
            _, block, layer = layer.split(".", 2)
            layers = QKV if layer == "attn.qkv" else (IN_BLOCK[layer],)
            for inner, part in zip(layers, value.chunk(len(layers)), strict=True):
                theirs[f"transformer_blocks.{block}.{inner}.{kind}"] = part.clone()
    own = {"num_classes": config["num_classes"], "null_class": null}
    if fitted is not None:
        own["fitted_times"] = times_digest(fitted.weights)
    return theirs, _their_config(config, own), fitted


def _check_known_there(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    if config["num_classes"] > NULL_CLASS:
        raise UserError(f"the model must have at most {NULL_CLASS} classes, as class {NULL_CLASS} is none to "
                        f"DiTPipeline, got {config['num_classes']}")  # fmt: skip
    if config.get("qk_norm"):
        raise UserError("the model must be without --qk-norm, which diffusers' DiT does not have")
    for name, only in (("positions", "sincos"), ("norm", "layernorm"), ("mlp", "gelu")):
        if config.get(name, only) != only:
            raise UserError(f"the model must be trained with --{name} {only}, as diffusers' DiT, got {config[name]}")
    if config.get("mlp_ratio", 4.0) != 4:
        raise UserError(f"the model must have mlp_ratio 4, as diffusers' DiT, got {config['mlp_ratio']:g}")
    positions = sincos_positions(config["hidden_size"], config["input_size"] // config["patch_size"])
    if (weights["pos_embed"][0].float() - positions).abs().max() > 1e-2:  # half a step of bfloat16 is 4e-3
        raise UserError("the model must have DiT's positions, which diffusers computes, got others in pos_embed")


def _padded(table: Tensor, num_classes: int, null: bool) -> Tensor:
    rest = table[num_classes:] if null else torch.full_like(table[:1], torch.nan)
    return torch.cat([table[:num_classes], rest.expand(NULL_CLASS + 1 - num_classes, -1)])


def _their_config(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAMES[0],
        "_haste": dict(own),
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "dropout": 0.0,
        "in_channels": config["in_channels"],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config["num_heads"],
        "num_embeds_ada_norm": NULL_CLASS,
        "num_layers": config["depth"],
        "out_channels": 2 * config["in_channels"],
        "patch_size": config["patch_size"],
        "sample_size": config["input_size"],
        "upcast_attention": False,
    }


def times_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that identify the weights of an embedder of times."""
    found = hashlib.sha256()
    for name in TIMES:
        found.update(weights[name].detach().cpu().contiguous().double().numpy().tobytes())
    return found.hexdigest()[:16]


# ---- from diffusers ----


@dataclass(frozen=True)
class _Own:
    """What `to_diffusers` keeps in a config."""

    num_classes: int
    null_class: bool
    fitted_times: str | None = None


@dataclass(frozen=True)
class TransformerConfig:
    """The part of a transformer's config.json that decides what it computes, with diffusers' defaults."""

    _class_name: str
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    sample_size: int = 32
    patch_size: int = 2
    num_layers: int = 28
    attention_bias: Literal[True] = True
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    _haste: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self._class_name not in CLASS_NAMES:
            raise UserError(f"the transformer must be a {CLASS_NAMES[0]}, got {shown(self._class_name)}")
        if self.out_channels != 2 * self.in_channels:
            raise UserError(f"out_channels must be twice in_channels, {2 * self.in_channels}, for noise and variance "
                            f"as DiT's, got {self.out_channels}")  # fmt: skip


def from_diffusers(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], times: Mapping[str, Tensor] | None, source: str
) -> tuple[Weights, dict[str, Any], FittedTimes | None]:
    """The weights of a DiT and its model_config.

    Times that `to_diffusers` fitted are DiT's again: those of `times`, or fitted back. Of any other folder they are
    taken as they are: the published ones hold DiT's weights.

    Args:
        weights: of a DiTTransformer2DModel.
        config: the content of its config.json.
        times: DiT's embedder of times from before it was fitted, by DiT's names.
        source: names the folder in messages.

    Returns:
        Weights, model_config, and how well times were fitted back (None if they were not).

    Raises:
        UserError: a transformer that DiT cannot compute, or weights that are not a transformer's.
    """
    known = build(TransformerConfig, config, f"config.json of {source}")
    ours = _our_names(weights, source)
    table = ours[TABLE]
    own = None if known._haste is None else build(_Own, known._haste, f"_haste in config.json of {source}")
    if own is None:
        num_classes, null = len(table) - 1, True
    else:
        num_classes, null = own.num_classes, own.null_class
        if not 1 <= num_classes < len(table):
            raise UserError(
                f"num_classes in config.json of {source} must be from 1 to {len(table) - 1}, got {num_classes}"
            )
    ours[TABLE] = torch.cat([table[:num_classes], table[-1:]]) if null else table[:num_classes].clone()
    back = None
    if own is not None and own.fitted_times is not None:
        if times is not None and own.fitted_times == times_digest(ours):
            ours.update(times)
        else:
            back = fit_times(ours, "diffusers", "dit")
            ours.update(back.weights)
    width, patch = known.num_attention_heads * known.attention_head_dim, known.patch_size
    depth = 1 + max((int(name.split(".")[1]) for name in ours if name.startswith("blocks.")), default=-1)
    if depth != known.num_layers:
        raise UserError(f"{source} must hold {known.num_layers} blocks, the num_layers of its config.json, got {depth}")
    model_config = {
        "family": "dit",
        "depth": depth,
        "hidden_size": width,
        "num_heads": known.num_attention_heads,
        "patch_size": patch,
        "input_size": known.sample_size,
        "in_channels": known.in_channels,
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if null else 0.0,
    }
    return ours, model_config, back


def positions(config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """`pos_embed` of a checked model_config, which no folder of diffusers holds."""
    return sincos_positions(config["hidden_size"], config["input_size"] // config["patch_size"])[None].to(dtype)


def _our_names(weights: Mapping[str, Tensor], source: str) -> Weights:
    """The weights by DiT's names. Raises UserError for one that no DiT has, and for blocks whose embedders differ."""
    ends = {theirs: ours for ours, theirs in ENDS.items()}
    shared = {theirs: ours for ours, theirs in SHARED.items()}
    in_block = {theirs: ours for ours, theirs in IN_BLOCK.items()}
    ours: Weights = {}
    attention: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        found = THEIR_BLOCK.fullmatch(name)
        block, inner = found.group(1, 2) if found else ("", "")
        if layer in ends:
            ours[f"{ends[layer]}.{kind}"] = value
        elif inner in shared:
            first = ours.setdefault(f"{shared[inner]}.{kind}", value)
            if first.shape != value.shape or not torch.equal(first.nan_to_num(), value.nan_to_num()):
                raise UserError(f"{source} must have one embedder of times and of classes, as DiT, got one of its own "
                                f"in block {block} ({name})")  # fmt: skip
        elif inner in in_block:
            ours[f"blocks.{block}.{in_block[inner]}.{kind}"] = value
        elif inner in QKV:
            attention.setdefault((block, kind), {})[inner] = value
        elif name != POSITIONS:
            raise UserError(f"{source} must hold the weights of a {CLASS_NAMES[0]}, got {name}")
    for (block, kind), parts in attention.items():
        missing = next((part for part in QKV if part not in parts), None)
        if missing is not None:
            raise UserError(
                f"{source} must hold the weights of a {CLASS_NAMES[0]}, but lacks {missing} of block {block}"
            )
        ours[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([parts[part] for part in QKV])
    if not all(name in ours for name in (*TIMES, TABLE)) or ours[TABLE].dim() != 2 or ours[TIMES[0]].dim() != 2:
        raise UserError(
            f"{source} must hold the weights of a {CLASS_NAMES[0]}, but lacks embedders of times and classes"
        )
    return ours
