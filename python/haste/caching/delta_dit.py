"""Δ-DiT (arXiv 2406.01125): a skipped step runs all blocks but one group, which is replaced by x + Δ.

Δ = F_group(x) − x is kept from the last full step. Early steps make a picture's outline, which the front blocks
carry, so they skip the rear group; late ones make its details and skip the front group (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

from haste.caching.regions import BlockGroup
from haste.caching.transformers import Transformer
from haste.errors import UserError

REAR, FRONT = 0, 1

# As published for PixArt-α: 12 of 20 steps, 21 of 28 blocks.
GATE_SHARE = 0.6
CACHED_SHARE = 0.75


def delta_dit_groups(model: Transformer, cached_blocks: int | None) -> list[BlockGroup]:
    """The rear and the front group; UserError for more blocks than there are."""
    depth = len(model.blocks)
    count = round(CACHED_SHARE * depth) if cached_blocks is None else cached_blocks
    if not 1 <= count <= depth:
        raise UserError(f"--cached-blocks must be between 1 and the model's {depth} blocks, got {count}")
    groups = {REAR: BlockGroup(model, depth - count, depth), FRONT: BlockGroup(model, 0, count)}
    return [groups[REAR], groups[FRONT]]


def delta_dit_gate(gate: int | None) -> Callable[[int, int], int]:
    """The group of a step: rear while more than `gate` steps remain, this one included; None: as published."""

    def group(step: int, num_steps: int) -> int:
        threshold = round(GATE_SHARE * num_steps) if gate is None else gate
        if not 0 <= threshold <= num_steps:
            raise UserError(f"--gate must be between 0 and the number of steps, {num_steps}, got {threshold}")
        return REAR if num_steps - step > threshold else FRONT

    return group
