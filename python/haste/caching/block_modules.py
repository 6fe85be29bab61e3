"""Granularity module for the classes of `block_table`: every attention and MLP is forecast, and gated at the new time.

A forecast call runs the model with stubs in place of its blocks. They pass the tokens on as they are and work out their
gates; the last one adds Σ_l gate_l(t) ⊙ F̂_l in one launch. What the model adds between its blocks, a ControlNet's
residuals for example, is so added at its present value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import haste_ext
from haste.caching.block_table import Activations, Arguments, BlockClass, PerTokenError, block_class
from haste.caching.discovery import Discovery, Executed, NoSeamError, Place, Run, stub, swapped
from haste.caching.forecaster import StoreSpec
from haste.errors import UserError, in_one_line


class CachedModule(NamedTuple):
    """A submodule of a block whose output is cached.

    Attributes:
        path: in its block. The module is looked up at every call: an adapter that is loaded takes its place.
        number: among the modules of its block's class.
        feature: which feature its output is, or is added to; None if its gate does not change with time.
    """

    path: str
    number: int
    feature: int | None


class Block(NamedTuple):
    """more: what the block returns behind the tokens, NaN; None for one that returns what its class says."""

    place: Place
    kind: BlockClass
    cached: list[CachedModule]
    more: tuple | None


class PerModule:
    """The output of every attention and MLP before its gate, as in TaylorSeer (arXiv 2503.06923), of the image's rows.

    A forecast call computes every gate at its own time: x + Σ_l gate_l(t) ⊙ F̂_l. Where blocks share their modulation,
    gate_l(t) = c_l + e(t), with e of the model and c_l of the block. A forecast F̂ is linear in the features, so

        Σ_l (c_l + e(t)) ⊙ F̂(F_l) = F̂(Σ_l c_l ⊙ F_l) + e(t) ⊙ F̂(Σ_l F_l),

    and in place of every module's feature these sums over the blocks are kept: one for each module of a block, and one
    of all that constants gate.

    Args:
        discovery: of one call of the model.

    Raises:
        NoSeamError: a block of a class that is not in the table, a compiled one, or modules that do not make up what
            the blocks add to the tokens.
    """

    def __init__(self, discovery: Discovery) -> None:
        blocks = [executed for executed in discovery.blocks if _has_image(executed)]
        if not blocks:
            raise _refused(discovery.blocks[0].place.module, "which are not called with an image's tokens")
        self._shared = all(_kind_of(executed).tables for executed in blocks)
        self._blocks, count = self._taken_apart(blocks)
        constants = [constant for block in self._blocks for constant in constants_of(block)]
        self._constant = count if any(constant is not None for constant in constants) else None
        self._count = count + (self._constant is not None)
        entering = _arguments(blocks[0])[self._blocks[0].kind.tokens]
        self._shape = entering.shape  # (rows, tokens, dim), of the image alone
        self._idle: dict[Place, nn.Module] = {}
        self.initial: list[Tensor] | None = None
        features = entering
        if not entering.is_meta:  # else only `stores` is of use
            features = self._verified(discovery)
            self.initial = [features]
            self._drop_embedders(discovery, features)
        rows, tokens, dim = self._shape
        self._spec = StoreSpec(self._count, rows, tokens, dim, features.dtype, features.device)
        modules, shape = sum(len(block.cached) for block in self._blocks), "×".join(map(str, self._shape))
        sums = f" in {self._count} sums" if self._shared else ""
        self.description = f"{modules} modules of {len(self._blocks)} blocks{sums} ({shape})"

    def _taken_apart(self, blocks: Sequence[Executed]) -> tuple[list[Block], int]:
        """The blocks with their cached submodules, and the number of features of these."""
        apart: list[Block] = []
        features: dict[Any, int] = {}
        for executed in blocks:
            module, kind, cached = executed.place.module, _kind_of(executed), []
            for number, (path, gate) in enumerate(zip(kind.modules, _gates(executed, kind), strict=True)):
                if has_submodule(module, path):
                    key = (type(module).__name__, path) if self._shared else len(features)
                    changes = gate is not None or not self._shared
                    feature = features.setdefault(key, len(features)) if changes else None
                    cached.append(CachedModule(path, number, feature))
            leaving = executed.leaving
            more = leaving[1:] if isinstance(leaving, tuple) and len(kind.returns) == 1 else None
            apart.append(Block(executed.place, kind, cached, more))
        return apart, len(features)

    # ---- calls ----

    def stores(self) -> list[StoreSpec]:
        return [self._spec]

    def full(self, run: Run, args: tuple, kwargs: dict, outs: Sequence[Tensor]) -> Any:
        with self._recorded(outs[0]):
            return run(args, kwargs)

    def _recorded(self, out: Tensor | None) -> FullCall:
        return FullCall(self._blocks, (self._count, *self._shape), self._constant, self._shared, out)

    def forecast(self, run: Run, args: tuple, kwargs: dict, features: Sequence[Tensor], weights: Tensor) -> Any:
        call = ForecastCall(self._blocks, features[0], weights, self._constant)
        with swapped({**self._idle, **call.stubs}):
            return run(args, kwargs)

    # ---- tries on the first call ----

    def _verified(self, discovery: Discovery) -> Tensor:
        """The features of one more run of the model, which are seen to make up what the blocks add."""
        last = self._blocks[-1]
        left: list[Tensor] = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            tokens = output[last.kind.returns.index(last.kind.tokens)] if isinstance(output, tuple) else output
            left.append(image_rows(tokens, self._shape[1], last.kind).clone())  # the model's tail may write to it

        handle = last.place.module.register_forward_hook(see)
        try:
            with self._recorded(None) as full:
                discovery.again({})
        finally:
            handle.remove()
        call = self._on_itself(full.out)
        try:
            discovery.again(call.stubs)
            adds_up = _adds_up(call.leaving, left[0], call.entering)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may do anything with what it does not expect
            raise _refused(last.place.module, f"which cannot be taken apart ({in_one_line(error)})") from error
        if not adds_up:
            raise _refused(last.place.module, "whose modules do not make up what the blocks add")
        return full.out

    def _on_itself(self, features: Tensor) -> ForecastCall:
        """A forecast at the time of the features alone."""
        weights = torch.ones(1, device=features.device)
        return ForecastCall(self._blocks, features.unsqueeze(1), weights, self._constant)

    def _drop_embedders(self, discovery: Discovery, features: Tensor) -> None:
        """Put stubs in place of the other modules that nothing reads on a forecast call."""
        blocks = {block.place for block in self._blocks}
        others = [executed for executed in [*discovery.others, *discovery.blocks] if executed.place not in blocks]
        places = [executed.place for executed in others]
        answer = discovery.again(self._on_itself(features).stubs)
        for executed in others:
            if places.count(executed.place) == 1:
                leaving = executed.leaving
                idle = {
                    **self._idle,
                    executed.place: stub(executed.place.module, lambda a, k, leaving=leaving: leaving),
                }
                try:
                    tried = discovery.again({**idle, **self._on_itself(features).stubs})
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # a model may do anything with what it does not expect
                    continue
                if discovery.same(answer, tried):
                    self._idle = idle


class FullCall:
    """Listens to the cached modules for the length of a call, and writes what they return to `out`.

    Args:
        shape: of `out`: (features, rows, tokens, dim).
        constant: the feature that constants gate.
        summed: several modules add to a feature.
        out: made, in the type of the first feature, if there is none.
    """

    def __init__(
        self, blocks: Sequence[Block], shape: tuple[int, ...], constant: int | None, summed: bool, out: Tensor | None
    ) -> None:
        self._blocks, self._shape, self._constant, self._summed = blocks, shape, constant, summed
        self._out, self._sums = out, torch.empty(0)
        self._begun: set[int] = set()  # features that have something in their sum
        self._kept: set[tuple[int, int]] = set()
        self._hooks: list[RemovableHandle] = []

    @property
    def out(self) -> Tensor:
        assert self._out is not None
        return self._out

    def __enter__(self) -> FullCall:
        for number, block in enumerate(self._blocks):
            for cached in block.cached:
                module = block.place.module.get_submodule(cached.path)
                self._hooks.append(module.register_forward_hook(partial(self._keep, number, cached)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            return
        if len(self._kept) < len(self._hooks):
            raise UserError("the model must run eagerly for granularity module, which listens to the modules of its "
                            "blocks, got a compiled one; take granularity model")  # fmt: skip
        if self._summed and self._sums is not self.out:
            self.out.copy_(self._sums)

    def _keep(self, number: int, cached: CachedModule, module: nn.Module, args: tuple, output: Any) -> None:
        if (number, cached.number) in self._kept:  # some blocks call a module for the image, then for the text
            return
        self._kept.add((number, cached.number))
        feature = self._feature_of(output, self._blocks[number], cached.path)
        if self._out is None:
            self._out = feature.new_empty(self._shape)
        if self._summed:
            self._add(feature, cached.feature, constants_of(self._blocks[number])[cached.number])
        else:
            self._out[cached.feature].copy_(feature)

    def _feature_of(self, output: Any, block: Block, path: str) -> Tensor:
        """Of what a cached module returns, the image's rows, (rows, tokens, dim)."""
        tokens = output[0] if isinstance(output, tuple) else output
        if tokens.dim() > 3:  # of a convolution
            tokens = tokens.flatten(2).transpose(1, 2) if block.kind.channels_first else tokens.flatten(1, -2)
        feature = image_rows(tokens, self._shape[2], block.kind)
        if feature.shape != self._shape[1:]:
            raise _refused(block.place.module, f"whose {path} returns {tuple(tokens.shape)} for tokens of "
                                               f"{tuple(self._shape[1:])}")  # fmt: skip
        return feature

    def _add(self, feature: Tensor, own: int | None, constant: Tensor | float | None) -> None:
        if not self._begun:  # over many blocks, so not in a type of 8 or 11 bits
            full = self.out.dtype in (torch.float32, torch.float64)
            self._sums = self.out if full else torch.empty_like(self.out, dtype=torch.float32)
        for number, factor in ((own, 1.0), (self._constant, constant)):
            if number is None or factor is None:
                continue
            if number not in self._begun:
                self._begun.add(number)
                self._sums[number].copy_(feature)
                if isinstance(factor, Tensor):
                    self._sums[number].mul_(factor)
            elif isinstance(factor, Tensor):
                self._sums[number].addcmul_(feature, factor)
            else:
                self._sums[number].add_(feature, alpha=factor)


class ForecastCall:
    """The stubs of one forecast call.

    Args:
        features: (features, slots, rows, tokens, dim).
        weights: (slots,) float32.
        constant: the feature whose gate is 1, which does not belong to a module.

    Attributes:
        stubs: in place of the blocks.
        entering, leaving: the image's tokens without and with the forecast, in the end.
    """

    def __init__(self, blocks: Sequence[Block], features: Tensor, weights: Tensor, constant: int | None) -> None:
        self.entering = self.leaving = torch.empty(0)
        self._features, self._weights = features, weights
        self._gates: list[Tensor | None] = [None] * len(features)
        if constant is not None:
            self._gates[constant] = features.new_ones(1)
        self._activations = Activations()
        self._modules = [block.place.module for block in blocks]  # the places hold stubs during the call
        self._last = len(blocks) - 1
        self.stubs = {
            block.place: stub(block.place.module, partial(self._answer, number, block))
            for number, block in enumerate(blocks)
        }

    def _answer(self, number: int, block: Block, args: tuple, kwargs: dict) -> Any:
        module, kind = self._modules[number], block.kind
        arguments = Arguments.of(module, args, kwargs, self._activations)
        lacking = [cached for cached in block.cached if self._lacks(cached)]
        gates = kind.gates(module, arguments) if lacking else []
        for _, own, feature in lacking:
            assert feature is not None
            gate = gates[own]
            self._gates[feature] = self._features.new_ones(1) if gate is None else gate
        if number == self._last:
            arguments[kind.tokens] = self._with_forecast(arguments[kind.tokens], kind)
        returned = tuple(arguments.get(name) for name in kind.returns)
        if block.more is not None:
            return returned + block.more
        return returned if len(returned) > 1 else returned[0]

    def _lacks(self, cached: CachedModule) -> bool:
        return cached.feature is not None and self._gates[cached.feature] is None

    def _with_forecast(self, tokens: Tensor, kind: BlockClass) -> Tensor:
        _, _, rows, count, dim = self._features.shape
        gates = torch.stack([gate.expand(rows, dim) for gate in self._gates if gate is not None])
        self.entering = image_rows(tokens, count, kind)
        self.leaving = haste_ext.taylor_extrapolate_blocks(
            self._features, self._weights, gates.to(self._features.dtype), self.entering
        )
        if tokens.shape[1] == count:
            return self.leaving
        text = tokens[:, :-count] if kind.text_first else tokens[:, count:]
        return torch.cat([text, self.leaving] if kind.text_first else [self.leaving, text], dim=1)


def image_rows(tokens: Tensor, count: int, kind: BlockClass) -> Tensor:
    """The image's, of tokens that may be joined with the text's."""
    return tokens[:, tokens.shape[1] - count :] if kind.text_first else tokens[:, :count]


def _kind_of(executed: Executed) -> BlockClass:
    block = executed.place.module
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in block.modules()):
        raise _refused(block, "which are compiled")
    kind = block_class(block)
    if kind is None:
        raise _refused(block, "which the table of block classes lacks")
    return kind


def _has_image(executed: Executed) -> bool:
    """Not so a block of the text's stream, or the text's projection for one block of many."""
    kind = block_class(executed.place.module)
    return "hidden_states" in _arguments(executed) if kind is None else bool(kind.modules)


def _arguments(executed: Executed) -> Arguments:
    args, kwargs = executed.entering
    return Arguments.of(executed.place.module, args, kwargs, Activations())


def _gates(executed: Executed, kind: BlockClass) -> Sequence[Tensor | None]:
    """Without values: which modules have one."""
    block = executed.place.module
    try:
        return kind.gates(block, _arguments(executed))
    except PerTokenError as error:
        raise _refused(block, str(error)) from error
    except KeyError as error:
        raise _refused(block, f"which are called without {error}") from error


def constants_of(block: Block) -> Sequence[Tensor | float | None]:
    """The constant parts of the gates of the modules of its class."""
    return [None] * len(block.kind.modules) if block.kind.tables is None else block.kind.tables(block.place.module)


def has_submodule(block: nn.Module, path: str) -> bool:
    try:
        return isinstance(block.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _adds_up(made: Tensor, left: Tensor, entered: Tensor) -> bool:
    """Equal but for rounding: what is added by its norm, the tokens by theirs."""
    if made.shape != left.shape:
        return False
    low = left.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(left.device.type)
    added, rounding = (0.05, 0.02) if low else (1e-3, 1e-5)
    made, left, entered = made.float(), left.float(), entered.float()
    return bool((made - left).norm() <= added * (left - entered).norm() + rounding * left.norm())


def _refused(block: nn.Module, why: str) -> NoSeamError:
    return NoSeamError(f"granularity must be model for a model of {type(block).__name__}s, {why}, got module")
