"""Checkpoints of other trainers: REPA's and HASTE's as they are, SiT's with its conventions turned round.

Ours have the same keys in the same order, so those trainers read them as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from haste.errors import UserError
from haste.models.embeddings import TimestepEmbedder
from haste.training.students import STUDENTS

Weights = dict[str, Tensor]

FIRST_AFTER_PROJECTORS = "final_layer."


def infer_model_config(weights: Weights, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of SiT that fit these weights, which is to say all but z_dims.

    args: the settings of the run that wrote them, for what the weights do not show; may be empty.
    Raises UserError if they are not those of a SiT of a known size.
    """
    try:
        _, tokens, width = weights["pos_embed"].shape
        _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        rows = len(weights["y_embedder.embedding_table.weight"])
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError("the weights are not those of a SiT: pos_embed, x_embedder or y_embedder is missing") from error
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    heads = {s["num_heads"] for s in STUDENTS.values() if (s["depth"], s["hidden_size"]) == (depth, width)}
    if not heads:
        raise UserError(f"the weights are a SiT of depth {depth} and width {width}, which none of the known sizes has")
    projector = weights.get("projectors.0.0.weight")
    num_classes = args.get("num_classes") or rows - 1
    if rows - num_classes not in (0, 1):
        raise UserError(f"its table of labels has {rows} rows, which fits no model of {num_classes} classes")
    return {
        "depth": depth,
        "hidden_size": width,
        "num_heads": heads.pop(),
        "patch_size": patch,
        "input_size": math.isqrt(tokens) * patch,
        "in_channels": channels,
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "encoder_depth": min(args.get("encoder_depth", 8), depth),
        "projector_dim": 2048 if projector is None else len(projector),
    }


def to_our_conventions(weights: Weights, args: Mapping[str, Any]) -> Weights:
    """Weights as read from any of these trainers, under our names and in our conventions."""
    return from_sit(rename_legacy(weights, args.get("encoder_depth", 8)))


def rename_legacy(weights: Weights, encoder_depth: int) -> Weights:
    """REPA's first checkpoints count the blocks after the projectors anew, as decoder_blocks."""
    old = "decoder_blocks."

    def rename(name: str) -> str:
        if not name.startswith(old):
            return name
        number, rest = name.removeprefix(old).split(".", 1)
        return f"blocks.{int(number) + encoder_depth}.{rest}"

    return {rename(name): value for name, value in weights.items()}


def from_sit(weights: Weights) -> Weights:
    """SiT's own weights, known by their learn_sigma head, as a model of our conventions; others as they are.

    SiT's f(x, s) predicts x₀ − ε at time s = 1 − t. So v(x, t) = −f(x, 1 − t):
    the head changes its sign and loses the half that predicts sigma, and the time embedding takes in that
    cos((1−t)ω) = cos ω·cos tω + sin ω·sin tω  and  sin((1−t)ω) = sin ω·cos tω − cos ω·sin tω.
    """
    head, embed = "final_layer.linear", "x_embedder.proj.weight"
    if embed not in weights or f"{head}.weight" not in weights:
        return weights
    _, channels, patch, _ = weights[embed].shape
    rows = patch * patch * channels
    if len(weights[f"{head}.weight"]) != 2 * rows:
        return weights
    converted = dict(weights)
    for name in (f"{head}.weight", f"{head}.bias"):
        value = weights[name]
        by_channel = value.view(patch * patch, 2 * channels, *value.shape[1:])
        converted[name] = -by_channel[:, :channels].reshape(rows, *value.shape[1:])
    frequencies = "t_embedder.mlp.0.weight"
    of_cos, of_sin = weights[frequencies].double().chunk(2, dim=1)
    embedder = TimestepEmbedder(1, num_frequencies=weights[frequencies].shape[1])
    cos, sin = embedder.frequencies(torch.ones(1, dtype=torch.float64)).chunk(2, dim=1)
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    converted[frequencies] = turned.to(weights[frequencies].dtype)
    return converted


# ---- the order of parameters, by which an optimizer's state counts them ----


def with_projectors(weights: Weights, projectors: Weights) -> Weights:
    """Weights of a model that has let go of its projectors, with these where they were."""
    merged: Weights = {}
    for name, value in weights.items():
        if name.startswith(FIRST_AFTER_PROJECTORS) and projectors.keys() - merged.keys():
            merged.update(projectors)
        merged[name] = value
    return merged


def reorder_state(state: Mapping[int, Any], source: Sequence[str], target: Sequence[str]) -> dict[int, Any]:
    """AdamW's state per parameter, counted in the order of `source`, for an optimizer that has `target`."""
    place = {name: number for number, name in enumerate(source)}
    return {number: state[place[name]] for number, name in enumerate(target) if name in place and place[name] in state}
