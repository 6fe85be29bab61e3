"""What of a transformer is cached: a region of it, whose work a skipped evaluation replaces by a forecast.

A region says how a full evaluation runs the blocks and what it keeps, and how a skipped one goes without. All are pure
functions of tensors: full(tokens, c, out) writes its features into out, skipped(tokens, c, snapshots, weights) reads
those of the last full evaluations. A region that looks ahead has corrections(c, snapshots, weights) in its place, which
makes what several skipped evaluations add to their tokens. So each can be compiled, or captured in a CUDA graph.

tokens (B, N, D), c (B, D), out (modules, B, N, D), snapshots (modules, slots, B, N, D), weights (slots,) float32; of S
evaluations c (S, B, D), weights (S, slots), corrections (S, B, N, D).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

import haste_ext
from haste.caching.transformers import Transformer, TransformerBlock, all_gates


class Region(Protocol):
    """modules: features kept per full evaluation. branch_outputs: they have the type that layers put out, which under
    autocast is not that of the tokens. looks_ahead: what a skipped evaluation adds to the tokens depends on them in no
    way. reads_tokens: a skipped evaluation starts from the tokens; if not, they are None."""

    modules: int
    branch_outputs: bool
    looks_ahead: bool
    reads_tokens: bool

    def full(self, tokens: Tensor, c: Tensor, out: Tensor) -> Tensor: ...

    def skipped(self, tokens: Tensor | None, c: Tensor, snapshots: Tensor, weights: Tensor) -> Tensor: ...


class PerModule:
    """The output of every attention and MLP before its gate, as TaylorSeer (arXiv 2503.06923) has it.

    A skipped evaluation still computes every gate at its own time: tokens + Σ_l gate_l(t) ⊙ F̂_l. The sum is known once
    the time is, so one pass over the snapshots makes that of every evaluation until the next full one.
    A full one is SiTBlock.forward with a copy of either output, and with addcmul, which reads the tokens once less.
    """

    branch_outputs = True
    looks_ahead = True
    reads_tokens = True

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.modules = 2 * len(model.blocks)

    def full(self, tokens: Tensor, c: Tensor, out: Tensor) -> Tensor:
        for index, block in enumerate(self.model.blocks):
            m = block.modulation(c)
            branch = block.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
            out[2 * index].copy_(branch)
            tokens = torch.addcmul(tokens, m.gate_attn.unsqueeze(1), branch)
            branch = block.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
            out[2 * index + 1].copy_(branch)
            tokens = torch.addcmul(tokens, m.gate_mlp.unsqueeze(1), branch)
        return tokens

    def corrections(self, c: Tensor, snapshots: Tensor, weights: Tensor) -> Tensor:
        gates = all_gates(self.model, c.flatten(0, 1)).unflatten(1, c.shape[:2]).transpose(0, 1)
        return haste_ext.taylor_extrapolate_steps(snapshots, weights, gates.to(snapshots.dtype))


class WholeModel:
    """The tokens after the last block, as TaylorSeer-Lite has it: a skipped evaluation runs the final layer alone."""

    branch_outputs = False
    looks_ahead = False
    reads_tokens = False
    modules = 1

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def full(self, tokens: Tensor, c: Tensor, out: Tensor) -> Tensor:
        tokens = _run(self.model.blocks, tokens, c)
        out[0].copy_(tokens)
        return tokens

    def skipped(self, tokens: None, c: Tensor, snapshots: Tensor, weights: Tensor) -> Tensor:
        return haste_ext.taylor_extrapolate(snapshots[0], weights)


class BlockGroup:
    """What blocks first … last − 1 add to the tokens; the others are run in every evaluation.

    Every block of a group is forecast with the same weights, so the sum of their forecasts is the forecast of their
    sum, tokens + Σ_l Σ_k w_k·F_{l,k} = tokens + Σ_k w_k·(Σ_l F_{l,k}). That sum alone is kept.
    """

    branch_outputs = False
    looks_ahead = False
    reads_tokens = True
    modules = 1

    def __init__(self, model: Transformer, first: int, last: int) -> None:
        self.before, self.group, self.after = model.blocks[:first], model.blocks[first:last], model.blocks[last:]

    def full(self, tokens: Tensor, c: Tensor, out: Tensor) -> Tensor:
        tokens = _run(self.before, tokens, c)
        # A copy, as blocks may write to what they are given: as SiT's do where somebody has made them x += ...
        entering, tokens = tokens.clone(), _run(self.group, tokens, c)
        torch.sub(tokens, entering, out=out[0])
        return _run(self.after, tokens, c)

    def skipped(self, tokens: Tensor, c: Tensor, snapshots: Tensor, weights: Tensor) -> Tensor:
        tokens = _run(self.before, tokens, c)
        return _run(self.after, haste_ext.taylor_extrapolate(snapshots[0], weights, residual=tokens), c)


def _run(blocks: Iterable[TransformerBlock], tokens: Tensor, c: Tensor) -> Tensor:
    for block in blocks:
        tokens = block(tokens, c)[0]
    return tokens


def make_region(model: Transformer, granularity: str) -> Region:
    """By the name that --granularity has."""
    if granularity == "block":
        return BlockGroup(model, 0, len(model.blocks))
    return PerModule(model) if granularity == "module" else WholeModel(model)
