"""Checkpoints of the public xAR code: their buffers, and the config of files that have none.

The public code loads its files strictly, buffers included: the mask, and for each block the tables of the rotation.
They follow from the sizes. An XAR has no buffers; they are in its `state_dict()`, and left out when one is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haste.errors import UserError
from haste.models.entities import Entities
from haste.models.family import Convention, ForeignCheckpoints, Weights
from haste.validation import check

if TYPE_CHECKING:
    from haste.models.xar import XAR

NAMES = ("z_proj.weight", "z_proj_ln.weight", "encoder_pos_embed_learned", "class_emb.weight")  # that no other has


def public_buffers(model: XAR, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Their names and values: the mask, and for each block the tables of the rotation."""
    visible, angles = model.entities.visible, model.angles
    yield f"{prefix}mask", torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[None, None]
    frequencies = model.frequencies.float()
    cos, sin = (table.repeat_interleave(2, dim=1).float() for table in (angles.cos(), angles.sin()))
    for part, blocks in (("encoder", model.encoder_blocks), ("decoder", model.decoder_blocks)):
        for number in range(len(blocks)):
            rope = f"{prefix}{part}_blocks.{number}.attn.rope"
            yield from ((f"{rope}.freqs", frequencies), (f"{rope}.freqs_cos", cos), (f"{rope}.freqs_sin", sin))


def is_public_buffer(name: str) -> bool:
    return name == "mask" or ".attn.rope." in name


def add_public_buffers(model: XAR, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """The public code loads its files strictly, so files for it must have them."""
    state.update(public_buffers(model, prefix))


def drop_public_buffers(model: XAR, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and is_public_buffer(name[len(prefix) :])]:
        del state[name]


class XARCheckpoints(ForeignCheckpoints):
    """Files of the public code: bare weights, or {model, model_ema, args, ...} of its trainer."""

    def rename(self, weights: Mapping[str, Tensor]) -> Weights:
        """Without the buffers, which follow from the sizes."""
        return {name: value for name, value in weights.items() if not is_public_buffer(name)}

    def convert_settings(self, args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
        """Of a run of the public trainer, whose names mean other things, none."""
        return dict(args) if "path_type" in args else {"path_type": "linear", "prediction": "v"}


def infer_config(
    weights: Mapping[str, Tensor], args: Mapping[str, Any], published_heads: Mapping[int, int]
) -> dict[str, Any] | None:
    """`Family.infer_config`; published_heads: by the width of a published size."""
    if not all(name in weights for name in NAMES):
        return None
    for name, dims in zip(NAMES, (2, 1, 3, 2), strict=True):
        if weights[name].dim() != dims:
            raise UserError(f"the weights are not those of an xAR: {name} has shape {tuple(weights[name].shape)}")
    (width, channels), places = weights["z_proj.weight"].shape, weights["encoder_pos_embed_learned"].shape[1]
    grid, rows = math.isqrt(places), len(weights["class_emb.weight"])
    if grid**2 != places:
        raise UserError(f"the weights are an xAR of {places} places, which make no square grid")
    depths = {part: _count_blocks(weights, f"{part}_blocks.") for part in ("encoder", "decoder")}
    num_classes = check(args.get("num_classes"), int | None, "num_classes of its settings") or rows - 1
    if rows - num_classes not in (0, 1):
        raise UserError(f"its table of classes has {rows} rows, which fits no model of {num_classes} classes")
    hidden = weights.get("encoder_blocks.0.mlp.fc1_g.weight")
    return {
        "width": width,
        "heads": _infer_heads(weights, width, published_heads),
        "encoder_depth": depths["encoder"],
        "decoder_depth": depths["decoder"],
        "mlp_hidden": None if hidden is None else len(hidden),
        "channels": channels,
        "grid": grid,
        **_infer_entities(weights, grid),
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
    }


def _infer_heads(weights: Mapping[str, Tensor], width: int, published: Mapping[int, int]) -> int:
    """By the number of frequencies, a quarter of a head's width; else as published."""
    frequencies = weights.get("encoder_blocks.0.attn.rope.freqs")
    count = 0 if frequencies is None or frequencies.dim() != 1 else len(frequencies)
    if count and not width % (4 * count):
        return width // (4 * count)
    if width not in published:
        raise UserError(f"the weights lack attn.rope.freqs, and are an xAR of width {width}, which no size has")
    return published[width]


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)}
    return sum(number.isdecimal() for number in numbers)


def _infer_entities(weights: Mapping[str, Tensor], grid: int) -> dict[str, Any]:
    """Cells or subsamples, by what the first token sees and by the rows and columns that the places are rotated by;
    without these tables cells of half of the grid, as published."""
    size = _infer_cell(weights.get("mask"), grid)
    cosines = weights.get("encoder_blocks.0.attn.rope.freqs_cos")
    if cosines is None or cosines.dim() != 2 or len(cosines) != grid**2:
        return {"entity": "cell", "entity_size": size}
    n = max(cosines.shape[1] // 4, 1)  # the first pair of rows turns by the row itself, that of columns by the column
    found = cosines[:, [0, 2 * n]] if cosines.shape[1] == 4 * n else cosines[:, :0]
    for entity, own in (("cell", size), ("subsample", grid // size)):
        wanted = Entities(entity, grid, own).coordinates.cos()
        if found.shape == wanted.shape and torch.allclose(found.double(), wanted, atol=1e-2):
            return {"entity": entity, "entity_size": own}
    raise UserError("the weights are an xAR whose attn.rope.freqs_cos are in the order of neither cells nor subsamples")


def _infer_cell(mask: Tensor | None, grid: int) -> int:
    """Tokens along a side of a cell, by what the first token sees; without a mask half of the grid, as published."""
    if mask is None or mask.dim() != 4 or mask.shape[2:] != (grid**2, grid**2):
        return max(grid // 2, 1)
    side = math.isqrt(int((mask[0, 0, 0] == 0).sum()))
    return side if side and not grid % side else max(grid // 2, 1)
