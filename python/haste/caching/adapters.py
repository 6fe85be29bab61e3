"""What a cache has to know of a transformer, and the models that it knows.

Haste's own SiT has these methods. A SiT or DiT of the public repositories (SiT, REPA, HASTE, DiT) has the same parts
under the same names, as its checkpoints show; PublicTransformer puts them together, and holds the result against the
model's own forward pass before it is trusted.

What of a transformer is cached: a region of it, whose work a skipped evaluation replaces by a forecast.

A region says how a full evaluation runs the blocks and what it keeps, and how a skipped one goes without. All are pure
functions of tensors: full(tokens, c, out) writes its features into out, skipped(tokens, c, snapshots, weights) reads
those of the last full evaluations. A region that looks ahead has corrections(c, snapshots, weights) in its place, which
makes what several skipped evaluations add to their tokens. So each can be compiled, or captured in a CUDA graph.

tokens (B, N, D), c (B, D), out (modules, B, N, D), snapshots (modules, slots, B, N, D), weights (slots,) float32; of S
evaluations c (S, B, D), weights (S, slots), corrections (S, B, N, D).

Δ-DiT (arXiv 2406.01125): a skipped step runs all blocks but one group, which is replaced by x + Δ.

Δ = F_group(x) − x is kept from the last full step. Early steps make an image's outline, which the front blocks
carry, so they skip the rear group; late ones make its details and skip the front group (section 3.3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import haste_ext
from haste.errors import UserError, in_one_line
from haste.models import ModelOutput, SiT
from haste.models.sit import Modulation, modulate


class TransformerBlock(Protocol):
    """One block as x + gate ⊙ attention(x), then x + gate ⊙ mlp(x), steered by c (B, D)."""

    def __call__(self, tokens: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        """The next tokens first."""

    def modulation(self, c: Tensor) -> Modulation: ...

    adaLN_modulation: nn.Sequential
    """What makes the modulation: an activation, then one linear layer of 6·D outputs."""

    def attention_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Any]: ...

    def mlp_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor: ...


class Transformer(Protocol):
    """tokens_shape: (N, D) of one image."""

    blocks: Sequence[TransformerBlock]
    tokens_shape: tuple[int, int]
    dtype: torch.dtype

    def tokens(self, x: Tensor) -> Tensor:
        """The image as tokens (B, N, D)."""

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """c (B, D); of t (S, 1), at S times of which each holds for the whole batch, (S, B, D)."""

    def output(self, tokens: Tensor, c: Tensor) -> Any:
        """What the model returns, made of the last tokens."""


def all_gates(model: Transformer, c: Tensor) -> Tensor:
    """The gates of every block, attention's and then the MLP's, (2·depth, B, D), without the rest of the modulations.

    They are the third and the last sixth of each layer's outputs. The other weights are not read, which at small
    batches is what these layers' time goes to.
    """
    activation = model.blocks[0].adaLN_modulation[0]
    c = activation(c)
    return torch.cat([_gates_alone(block.adaLN_modulation[1], c) for block in model.blocks])


def _gates_alone(linear: nn.Linear, activated: Tensor) -> Tensor:
    width = linear.out_features // 6
    weight = linear.weight.view(6, width, -1)[2::3]
    bias = linear.bias.view(6, 1, width)[2::3]
    return torch.baddbmm(bias, activated.expand(2, -1, -1), weight.transpose(1, 2))


def _times_embedded(model: nn.Module, t: Tensor) -> Tensor:
    """(…, D) of t (…): the embedders take one dimension."""
    return model.t_embedder(t.flatten()).unflatten(0, t.shape)


class OwnTransformer:
    """Haste's SiT."""

    def __init__(self, model: SiT) -> None:
        self.model = model
        self.blocks = model.blocks
        self.tokens_shape = tuple(model.pos_embed.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def tokens(self, x: Tensor) -> Tensor:
        return self.model.tokens(x)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return _times_embedded(self.model, t) + self.model.y_embedder(y)

    def output(self, tokens: Tensor, c: Tensor) -> ModelOutput:
        return ModelOutput(self.model.finish(tokens, c), [], [])


MODEL_PARTS = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer", "unpatchify")
BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


class PublicBlock:
    """A block of a public repository, by its parts."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.adaLN_modulation = block.adaLN_modulation

    def __call__(self, tokens: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        out = self.block(tokens, c)
        return out if isinstance(out, tuple) else (out, None)

    def modulation(self, c: Tensor) -> Modulation:
        return Modulation(*self.block.adaLN_modulation(c).chunk(6, dim=1))

    def attention_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Any]:
        out = self.block.attn(modulate(self.block.norm1(tokens), shift, scale))
        return out if isinstance(out, tuple) else (out, None)

    def mlp_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.block.mlp(modulate(self.block.norm2(tokens), shift, scale))


# What parts that are other things than their names say raise when they are put together.
ODD_PARTS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError)


def _close(made: Tensor, wanted: Tensor) -> bool:
    """Equal but for rounding, by the norm."""
    low = made.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(made.device.type)
    difference = (wanted - made).norm() if made.shape == wanted.shape else torch.tensor(torch.inf)
    return bool(difference <= (0.05 if low else 1e-3) * wanted.norm() + 1e-12)


class PublicTransformer:
    """A SiT or DiT of a public repository: called model(x, t, y), it returns an image, or a tuple that begins with one.

    Raises UserError from `verify` for a model that computes something else than its parts suggest.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = [PublicBlock(block) for block in model.blocks]
        self.tokens_shape = tuple(model.pos_embed.shape[1:])
        self._form: str | None = None  # of the model's answer

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.final_layer.parameters()).dtype

    def tokens(self, x: Tensor) -> Tensor:
        return self.model.x_embedder(x) + self.model.pos_embed

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return _times_embedded(self.model, t) + self.model.y_embedder(y, self.model.training)

    def output(self, tokens: Tensor, c: Tensor) -> Any:
        return self._in_form(self._image(tokens, c))

    def verify(self, x: Tensor, t: Tensor, y: Tensor, gates: bool) -> None:
        """Runs the model once, to see the form of its answer and that it is what its parts compute.

        gates: whether `all_gates` must be right as well.
        """
        if self._form is not None:
            return
        answer = self.model(x, t, y)
        first = answer[0] if isinstance(answer, tuple) and answer else answer
        try:
            same = isinstance(first, Tensor) and self._computes(first, x, t, y, gates)
        except torch.OutOfMemoryError:
            raise
        except ODD_PARTS as error:
            raise UserError(f"{self._something_else()} ({in_one_line(error)})") from error
        if not same:
            raise UserError(self._something_else())
        self._form = "tuple" if isinstance(answer, tuple) else "tensor"

    def _something_else(self) -> str:
        return (
            f"the model, a {type(self.model).__name__}, computes something else than its blocks and layers in the "
            "order of SiT and DiT; a cache can be wrapped around those, and around haste's own SiT"
        )

    def _computes(self, answer: Tensor, x: Tensor, t: Tensor, y: Tensor, gates: bool) -> bool:
        """Whether the parts, put together, give the model's answer."""
        tokens, c = self.tokens(x), self.conditioning(t, y)
        made = []
        for block in self.blocks:
            m = block.modulation(c)
            made += [m.gate_attn, m.gate_mlp]
            tokens = tokens + m.gate_attn.unsqueeze(1) * block.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
            tokens = tokens + m.gate_mlp.unsqueeze(1) * block.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
        if gates and not _close(all_gates(self, c), torch.stack(made)):
            return False
        image = self._image(tokens, c)
        # SiT's own drops the half of its channels that learn_sigma adds; DiT returns both.
        self._half = 2 * answer.shape[1] == image.shape[1]
        return _close(image.chunk(2, dim=1)[0] if self._half else image, answer)

    def _image(self, tokens: Tensor, c: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.final_layer(tokens, c))

    def _in_form(self, image: Tensor) -> Any:
        image = image.chunk(2, dim=1)[0] if self._half else image
        return (image, []) if self._form == "tuple" else image


def adapt(model: nn.Module) -> Transformer:
    """The model as a cache sees it; UserError for one that it does not know."""
    if isinstance(model, SiT):
        return OwnTransformer(model)
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is compiled; wrap the model itself, and compile the result by its compile()")
    lacking = _what_is_lacking(model)
    if lacking:
        raise UserError(
            f"the model is a {type(model).__name__} {lacking}; a cache can be wrapped around haste's SiT and "
            "around models with the parts of the public SiT and DiT"
        )
    return PublicTransformer(model)


def _what_is_lacking(model: Any) -> str | None:
    """Of a model as SiT and DiT are; None if it has all of their parts, in their forms."""
    for part in MODEL_PARTS:
        if not hasattr(model, part):
            return f"without {part}"
    if not isinstance(model, nn.Module) or not isinstance(model.blocks, (nn.ModuleList, nn.Sequential)):
        return "whose blocks are no list of modules"
    for block in model.blocks if len(model.blocks) else [model]:
        for part in BLOCK_PARTS:
            if not hasattr(block, part):
                return f"without blocks.{part}"
    if not isinstance(model.pos_embed, Tensor) or model.pos_embed.dim() != 3:
        return "whose pos_embed is no tensor of shape (1, N, D)"
    if not isinstance(model.final_layer, nn.Module) or next(model.final_layer.parameters(), None) is None:
        return "whose final_layer has no weights"
    try:
        inspect.signature(model.forward).bind(*"xty")
    except TypeError as error:
        return f"that is not called as model(x, t, y) ({error})"
    return None


class CacheGranularity(Protocol):
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


def make_region(model: Transformer, granularity: str) -> CacheGranularity:
    """By the name that --granularity has."""
    if granularity == "block":
        return BlockGroup(model, 0, len(model.blocks))
    return PerModule(model) if granularity == "module" else WholeModel(model)


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
