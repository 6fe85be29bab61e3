"""The granularities of models of haste's families, which bring a `CachedTransformer`: what a forecast call replaces.

The calls of a granularity are pure functions of tensors, so each can be compiled, or captured in a CUDA graph:

    full(x, t, y, out)                      the model's output; its features are written to out
    forecast(x, t, y, features, weights)    the output, from the features of the last full calls
    corrections(t, y, features, weights)    in place of forecast: what several calls add to their tokens, and their
    corrected(x, added, c)                  conditioning; then the output of each of these calls

x, t, y as the model takes them, tokens and c (B, N, D) and (B, D), out (modules, B, N, D), features (modules, slots, B,
N, D), weights (slots,) float32; of S calls at once t (S, 1), c (S, B, D), weights (S, slots), added (S, B, N, D).

Of two streams of tokens, such as a text's and the image's, the image's is cached, and a forecast call runs the other
only where a block reads it. Behind Δ-DiT's front blocks others do: of these the changes of both are kept, the other
stream's N' tokens in front, out (1, B, N' + N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

import haste_ext
from haste._compat import is_compiled
from haste.caching.config import CacheConfig
from haste.errors import UserError
from haste.models import CachedBlock, CachedTransformer, ModelOutput, Streams, families, get_family

# ---- models ----


def can_take_apart(model: nn.Module, config: CacheConfig) -> bool:
    """Whether a model is of a family of haste's that has an adapter for this granularity."""
    if not _is_of_a_family(model):
        return False
    return _is_output(config) or get_family(model).cached(model) is not None


def is_made_in_parts(model: Any) -> bool:
    """Whether a model is of a family of haste's whose images are made in parts."""
    return isinstance(model, nn.Module) and _is_of_a_family(model) and get_family(model).in_parts


def _is_of_a_family(model: nn.Module) -> bool:
    return getattr(model, "family", None) in [family.name for family in families()]


def find_transformer(model: nn.Module, config: CacheConfig) -> CachedTransformer | OpaqueModel:
    """Return the adapter of a model of haste's for a cache.

    Raises:
        UserError: there is none for this model, or the model is compiled.
    """
    if _is_output(config):
        return OpaqueModel(model)
    if is_compiled(model):
        raise UserError(f"model must not be compiled before enable_cache, got a compiled {type(model).__name__}; "
                        "compile the result by its compile(), or take granularity output")  # fmt: skip
    transformer = get_family(model).cached(model)
    if transformer is None:
        raise UserError(f"model must be of a family whose blocks a cache knows, got a {type(model).__name__}")
    return transformer


def _is_output(config: CacheConfig) -> bool:
    return config.granularity == "output" and config.cache != "delta-dit"


class OpaqueModel:
    """Any model that is called model(x, t, y); a cache sees its output only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        own = getattr(self.model, "dtype", None)
        first = next(self.model.parameters(), None)
        return own if own is not None else torch.get_default_dtype() if first is None else first.dtype


def all_gates(transformer: CachedTransformer, c: Tensor) -> Tensor:
    """The gates of every block, attention's and then the MLP's, (2·depth, B, D), without the rest of the modulations.

    They are the third and the last sixth of each layer's outputs. The other weights are not read, which at small
    batches is what these layers' time goes to.
    """
    c = transformer.blocks[0].adaLN_modulation[0](c)
    return torch.cat([_gates_alone(block.adaLN_modulation[1], c) for block in transformer.blocks])


def _gates_alone(linear: nn.Linear, activated: Tensor) -> Tensor:
    width = linear.out_features // 6
    weight = linear.weight.view(6, width, -1)[2::3]
    bias = linear.bias.view(6, 1, width)[2::3]
    return torch.baddbmm(bias, activated.expand(2, -1, -1), weight.transpose(1, 2))


# ---- granularities ----


class CacheGranularity:
    """What of a transformer is cached.

    Its functions are methods, not closures, so that copy.deepcopy of a cached model runs the copied model.

    Attributes:
        description: what is cached, for reports.
        modules: number of features kept of each full call.
        branch_outputs: the features have the type of the layers' outputs, which under autocast is not the tokens'.
        looks_ahead: what a forecast call adds to the tokens does not depend on them.
    """

    description: str
    modules = 1
    branch_outputs = False
    looks_ahead = False

    def __init__(self, transformer: CachedTransformer) -> None:
        self.transformer = transformer

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        names = ("full", "corrections", "corrected") if self.looks_ahead else ("full", "forecast")
        return {name: getattr(self, name) for name in names}

    def features_shape(self, input_shape: Sequence[int], y: Tensor | None = None) -> tuple[int, int]:
        """(N, D) of the features of one image, of shape (C, H, W), under the condition y or one as usual."""
        return self.transformer.tokens_shape

    def full(self, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Any:
        c = self.transformer.conditioning(t, y)
        return self.transformer.output(image_of(self._run(self.transformer.streams(x, y), c, out)), c)

    def _run(self, streams: Streams, c: Tensor, out: Tensor) -> Streams:
        """All blocks in full: what leaves the last one."""
        raise NotImplementedError


class PerModule(CacheGranularity):
    """The output of every attention and MLP before its gate, as in TaylorSeer (arXiv 2503.06923).

    A forecast call computes every gate at its own time: tokens + Σ_l gate_l(t) ⊙ F̂_l. The sum depends on the time
    only, so one pass over the features makes the sums of all calls until the next full one.
    """

    branch_outputs = True
    looks_ahead = True

    def __init__(self, transformer: CachedTransformer) -> None:
        super().__init__(transformer)
        self.modules = 2 * len(transformer.blocks)
        self.description = f"the outputs of {self.modules} attentions and MLPs"

    def _run(self, streams: Streams, c: Tensor, out: Tensor) -> Streams:
        for index, block in enumerate(self.transformer.blocks):
            streams = block.record(streams, c, out[2 * index], out[2 * index + 1])
        return streams

    def corrections(self, t: Tensor, y: Tensor, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of S forecast calls at t (S, 1), or one at t (B,)."""
        c = self.transformer.conditioning(t, y)
        c = c.view(-1, len(y), c.shape[-1])
        gates = all_gates(self.transformer, c.flatten(0, 1)).unflatten(1, c.shape[:2]).transpose(0, 1)
        return haste_ext.taylor_extrapolate_steps(features, weights, gates.to(features.dtype)), c

    def corrected(self, x: Tensor, added: Tensor, c: Tensor) -> Any:
        return self.transformer.output(self.transformer.tokens(x).add_(added), c)


class BlockGroup(CacheGranularity):
    """What blocks first … last − 1 add to the tokens; the other blocks run in every call.

    Every block of a group is forecast with the same weights, so the sum of their forecasts is the forecast of their
    sum, tokens + Σ_l Σ_k w_k·F_{l,k} = tokens + Σ_k w_k·(Σ_l F_{l,k}). That sum alone is kept; of two streams both
    sums, if there are blocks behind the group that read them.
    """

    def __init__(self, transformer: CachedTransformer, first: int, last: int) -> None:
        super().__init__(transformer)
        blocks = transformer.blocks
        self.before, self.group, self.after = blocks[:first], blocks[first:last], blocks[last:]
        self.description = f"what {last - first} of {len(blocks)} blocks add to the tokens"

    def features_shape(self, input_shape: Sequence[int], y: Tensor | None = None) -> tuple[int, int]:
        tokens, dim = self.transformer.tokens_shape
        return (tokens + self.transformer.prefix(y) if len(self.after) else tokens), dim

    def _run(self, streams: Streams, c: Tensor, out: Tensor) -> Streams:
        streams = _run_blocks(self.before, streams, c)
        entering = self._joined(streams).clone()  # as blocks may write to their input
        streams = _run_blocks(self.group, streams, c)
        torch.sub(self._joined(streams), entering, out=out[0])
        return _run_blocks(self.after, streams, c)

    def forecast(self, x: Tensor, t: Tensor, y: Tensor, features: Tensor, weights: Tensor) -> Any:
        c = self.transformer.conditioning(t, y)
        if len(self.before) or len(self.after):
            streams = self.transformer.streams(x, y)
            streams = _run_blocks(self.before, streams, c, image_alone=not len(self.after))
        else:
            streams = self.transformer.tokens(x)
        streams = _run_blocks(self.after, self._forecast_of(streams, features[0], weights), c)
        return self.transformer.output(image_of(streams), c)

    def _joined(self, streams: Streams) -> Tensor:
        """The tokens whose changes are kept, the other stream's in front of the image's."""
        if isinstance(streams, tuple) and len(self.after):
            return torch.cat(streams, dim=1)
        return image_of(streams)

    def _forecast_of(self, streams: Streams, changes: Tensor, weights: Tensor) -> Streams:
        if isinstance(streams, tuple) and len(self.after):
            other, image = streams
            of_other, of_image = changes.split([other.shape[1], image.shape[1]], dim=-2)
            forecast = haste_ext.taylor_extrapolate(of_other, weights, residual=other)
            return forecast, haste_ext.taylor_extrapolate(of_image, weights, residual=image)
        return haste_ext.taylor_extrapolate(changes, weights, residual=image_of(streams))


class WholeModel(CacheGranularity):
    """The tokens after the last block, as in TaylorSeer-Lite: a forecast call runs the final layer only."""

    description = "the tokens after the last block"

    def _run(self, streams: Streams, c: Tensor, out: Tensor) -> Streams:
        streams = _run_blocks(self.transformer.blocks, streams, c)
        out[0].copy_(image_of(streams))
        return streams

    def forecast(self, x: Tensor, t: Tensor, y: Tensor, features: Tensor, weights: Tensor) -> Any:
        c = self.transformer.conditioning(t, y)
        return self.transformer.output(haste_ext.taylor_extrapolate(features[0], weights), c)


class WholeOutput(CacheGranularity):
    """The model's output: a forecast call runs no part of the model. For any model; where the last layer is modulated
    by time, as in SiT, `WholeModel` costs no more and is more accurate."""

    description = "the model's output"

    def __init__(self, opaque: OpaqueModel) -> None:
        self.model = opaque.model
        self._form = "ModelOutput" if hasattr(self.model, "family") else ""  # of the model's answer
        self._outputs = 2 if getattr(self.model, "prediction", None) == "noise" else 1  # the variance beside the noise

    def features_shape(self, input_shape: Sequence[int], y: Tensor | None = None) -> tuple[int, int]:
        return self._outputs * input_shape[0], prod(input_shape[1:])

    def full(self, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Any:
        answer = self.model(x, t, y)
        self._form = self._form or ("tuple" if isinstance(answer, tuple) else "tensor")
        image = answer if isinstance(answer, Tensor) else answer[0]
        if image.shape != self._shape(x):
            name = type(self.model).__name__
            raise UserError(f"--granularity must be module, block or model for {name}, which makes "
                            f"{tuple(image.shape)} of {tuple(x.shape)}, got output")  # fmt: skip
        out[0].copy_(image.reshape_as(out[0]))
        return answer

    def forecast(self, x: Tensor, t: Tensor, y: Tensor, features: Tensor, weights: Tensor) -> Any:
        image = haste_ext.taylor_extrapolate(features[0], weights).view(self._shape(x))
        if self._form == "ModelOutput":
            return ModelOutput(image, [], [])
        return (image, []) if self._form == "tuple" else image

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the prediction."""
        return (x.shape[0], self._outputs * x.shape[1], *x.shape[2:])


def _run_blocks(blocks: Sequence[CachedBlock], streams: Streams, c: Tensor, image_alone: bool = False) -> Streams:
    """image_alone: of what leaves the last of them nothing else is read."""
    for index, block in enumerate(blocks, 1):
        streams = block.run(streams, c, image_alone and index == len(blocks))
    return streams


def image_of(streams: Streams) -> Tensor:
    """The image's tokens."""
    return streams if isinstance(streams, Tensor) else streams[1]


def make_granularities(transformer: CachedTransformer | OpaqueModel, config: CacheConfig) -> list[CacheGranularity]:
    """Return the granularity that --granularity names; for Δ-DiT (arXiv 2406.01125) the rear and the front blocks.

    A forecast step of Δ-DiT runs all blocks but one group, which is replaced by x + Δ, with Δ = F_group(x) − x of the
    last full step. Early steps form the outline, which the front blocks carry, so they skip the rear group; late steps
    form details and skip the front group (section 3.3).

    Raises:
        UserError: more blocks than there are.
    """
    if isinstance(transformer, OpaqueModel):
        return [WholeOutput(transformer)]
    depth = len(transformer.blocks)
    config.check_depth(depth)
    if config.cache == "delta-dit":
        count = config.resolved_cached_blocks(depth)
        return [BlockGroup(transformer, depth - count, depth), BlockGroup(transformer, 0, count)]
    if config.granularity == "block":
        return [BlockGroup(transformer, 0, depth)]
    return [PerModule(transformer) if config.granularity == "module" else WholeModel(transformer)]
