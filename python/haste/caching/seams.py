"""What of any model is cached, and what a forecast call then runs.

    Output       the model's answer; a forecast call runs nothing
    Group        what a group of blocks returns, or adds to what enters it; a forecast call runs everything else
    PerModule    the output of every attention and MLP (block_modules.py)

A seam is made from one call of the model (`Discovery`) and serves the calls that are made alike: with tensors of the
same shapes. Its features are raw, and a forecast is their weighted sum (forecaster.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import haste_ext
from haste.caching.block_modules import PerModule
from haste.caching.config import CacheConfig
from haste.caching.discovery import (
    Discovery,
    Executed,
    Live,
    NoSeamError,
    Place,
    Run,
    copied,
    fill_live,
    floats,
    hollow,
    refill,
    stub,
    swapped,
)
from haste.caching.forecaster import StoreSpec


class Seam(Protocol):
    """What of a model is cached.

    Attributes:
        description: what is cached, for reports, such as "tokens after 57 blocks".
        initial: the features of the call that the seam was made from, each shaped as `stores` says, until they are
            taken; None for a seam that must see another call.
    """

    description: str
    initial: list[Tensor] | None

    def stores(self) -> list[StoreSpec]:
        """The features of one full call."""

    def full(self, run: Run, args: tuple, kwargs: dict, outs: Sequence[Tensor]) -> Any:
        """The model's answer; writes its features to outs, (modules, rows, tokens, dim) each."""

    def forecast(self, run: Run, args: tuple, kwargs: dict, features: Sequence[Tensor], weights: Tensor) -> Any:
        """The answer from features of full calls, (modules, slots, rows, tokens, dim) each, with weights (slots,)."""


def spec_of(tensor: Tensor) -> StoreSpec:
    """Any tensor as rows of its last dimension."""
    dim = tensor.shape[-1] if tensor.dim() else 1
    return StoreSpec(1, 1, prod(tensor.shape[:-1]), dim, tensor.dtype, tensor.device)


def extrapolate(features: Tensor, weights: Tensor, shape: torch.Size, base: Tensor | None = None) -> Tensor:
    """base + Σ_k weights_k · features_k in the shape of the tensor that `spec_of` was given."""
    residual = None if base is None else base.reshape(features.shape[2:])
    return haste_ext.taylor_extrapolate(features[0], weights, residual).view(shape)


class Output:
    """The model's answer, of whatever structure: all of its floating-point tensors."""

    def __init__(self, answer: Any) -> None:
        self._form = hollow(answer)
        self.initial: list[Tensor] | None = floats(answer)
        if not floats(answer):
            raise NoSeamError(f"the model must return tensors of numbers to be cached, got {type(answer).__name__}")
        self.description = f"the model's output ({_count(len(floats(answer)), 'tensor')})"

    def stores(self) -> list[StoreSpec]:
        return [spec_of(tensor) for tensor in floats(self._form)]

    def full(self, run: Run, args: tuple, kwargs: dict, outs: Sequence[Tensor]) -> Any:
        answer = run(args, kwargs)
        for out, tensor in zip(outs, floats(answer), strict=True):
            out.view(tensor.shape).copy_(tensor)
        return answer

    def forecast(self, run: Run, args: tuple, kwargs: dict, features: Sequence[Tensor], weights: Tensor) -> Any:
        forms = floats(self._form)
        values = [extrapolate(each, weights, form.shape) for each, form in zip(features, forms, strict=True)]
        return refill(self._form, iter(values))


class Group:
    """What leaves blocks first … last − 1 of the run, by itself or as what the group adds to what enters it.

    A forecast call runs the model with stubs in place of the group and of every embedder that nothing else reads.

    Args:
        based: keep what leaves minus what enters. Any choice of what enters gives a correct seam; among tensors of one
            shape the closest is taken, which is the residual stream's.

    Raises:
        NoSeamError: the rest of the model reads more than what leaves the group.
    """

    def __init__(self, discovery: Discovery, first: int, last: int, based: bool) -> None:
        self._blocks = discovery.blocks
        whole = last == len(self._blocks)
        self._sinks: dict[Place, Any] = discovery.sinks if whole else {}
        entering, leaving = self._at_both_ends(discovery, first, last, whole)
        self._live = discovery.live if whole else [Live(i, None) for i in range(len(leaving))]
        if not self._live:
            raise NoSeamError("granularity must be output for this model, which reads nothing that its blocks return")
        values = [live.of(leaving) for live in self._live]
        if based and whole and not first:
            first, entering = _first_entered(discovery, self._live, leaving)
        bases = _bases(self._live, leaving, entering) if based else [None] * len(values)
        self._bases, self._entry = bases, self._blocks[first].place
        self._writes = discovery.writes
        self._forms = {place: hollow(value) for place, value in self._sinks.items()}
        self._shapes = [value.shape for value in values]
        self._specs = [spec_of(value) for value in values]
        self.description = _describe(last - first, whole, based, values)
        self._taken: dict[Place | str, Any] = {}
        self._answers: Any = None
        self._recorders = self._make_recorders(based)
        self._stubs = self._make_stubs(first, last, based)
        self._check(discovery, values, entering)
        if whole and (not based or self._entry in discovery.entered):  # else each try would run the other blocks
            self._drop_embedders(discovery, values, entering)
        self.initial: list[Tensor] | None = [
            value if base is None else value - base.of(entering) for value, base in zip(values, bases, strict=True)
        ]
        # From here on only their places are of use; the tensors would stay for as long as the seam.
        self._sinks = dict.fromkeys(self._sinks)
        self._answers = None
        self._taken.clear()

    def _at_both_ends(self, discovery: Discovery, first: int, last: int, whole: bool) -> tuple[list, list]:
        """The tensors that enter the group and those that leave it."""
        if whole and not first:
            return [], floats(list(self._sinks.values()))
        entering, leaving = discovery.between(first, last)
        if not whole:
            self._sinks = {self._blocks[last - 1].place: leaving}
        inside = {block.place for block in self._blocks[first:last]}
        if not inside.issuperset(self._sinks):
            raise NoSeamError("cache must not be delta-dit for this model, whose answer depends on blocks outside of "
                              "the skipped group too; take granularity model or output")  # fmt: skip
        return entering, floats(list(self._sinks.values()))

    # ---- the stand-ins ----

    def _make_recorders(self, based: bool) -> dict[Place, nn.Module]:
        """Of a full call: the ends of the group, which run as ever and leave what they saw."""
        places = {self._entry, *self._sinks} if based else set(self._sinks)

        def recorder(place: Place) -> nn.Module:
            module = place.module

            def answer(args: tuple, kwargs: dict) -> Any:
                if based and place == self._entry:
                    self._note_entering(args, kwargs)
                leaving = module(*args, **kwargs)
                if place in self._sinks:
                    self._taken[place] = [tensor.clone() for tensor in floats(leaving)]  # the tail may write to it
                return leaving

            return stub(module, answer)

        return {place: recorder(place) for place in places}

    def _make_stubs(self, first: int, last: int, based: bool) -> dict[Place, nn.Module]:
        """Of a forecast call: the entry notes what enters, the sinks answer with the forecast."""

        def stand_in(block: Executed) -> nn.Module:
            def answer(args: tuple, kwargs: dict) -> Any:
                if based and block.place == self._entry:
                    self._note_entering(args, kwargs)
                if block.place in self._sinks:
                    return self._answers()[block.place]
                return copied(block.leaving) if self._writes else block.leaving

            return stub(block.place.module, answer)

        return {block.place: stand_in(block) for block in self._blocks[first:last]}

    def _note_entering(self, args: tuple, kwargs: dict) -> None:
        entering = floats((args, kwargs))
        self._taken["bases"] = [None if base is None else base.of(entering).clone() for base in self._bases]

    def _check(self, discovery: Discovery, values: list[Tensor], entering: list[Tensor], extra: Any = None) -> bool:
        """Whether the answer stays with all stubs in place, and `extra` ones; without these it must (NoSeamError)."""
        filled = fill_live(self._forms, self._live, values)
        self._answers = lambda: copied(filled)  # the model may write to it
        self._taken.clear()
        holds = discovery.holds({**self._stubs, **(extra or {})})
        noted = zip(self._taken.get("bases", []), self._bases, strict=False)
        holds = holds and all(base is None or torch.equal(seen, base.of(entering)) for seen, base in noted)
        if not holds and extra is None:
            raise NoSeamError("granularity must be model or output for this model, and cache not delta-dit, as it "
                              "reads more than what leaves these blocks")  # fmt: skip
        return holds

    def _drop_embedders(self, discovery: Discovery, values: list[Tensor], entering: list[Tensor]) -> None:
        """Put stubs in place of the other modules that nothing reads on a forecast call."""
        places = [executed.place for executed in discovery.others]
        for executed in discovery.others:
            if places.count(executed.place) == 1:
                leaving = executed.leaving
                idle = {executed.place: stub(executed.place.module, lambda args, kwargs, leaving=leaving: leaving)}
                if self._check(discovery, values, entering, idle):
                    self._stubs |= idle

    # ---- calls ----

    def stores(self) -> list[StoreSpec]:
        return self._specs

    def full(self, run: Run, args: tuple, kwargs: dict, outs: Sequence[Tensor]) -> Any:
        self._taken.clear()
        with swapped(self._recorders):
            answer = run(args, kwargs)
        leaving = [tensor for place in self._sinks for tensor in self._taken[place]]
        bases = self._taken.get("bases", [None] * len(self._live))
        for out, live, base in zip(outs, self._live, bases, strict=True):
            value = live.of(leaving)
            if base is None:
                out.view(value.shape).copy_(value)
            else:
                torch.sub(value, base, out=out.view(value.shape))
        self._taken.clear()
        return answer

    def forecast(self, run: Run, args: tuple, kwargs: dict, features: Sequence[Tensor], weights: Tensor) -> Any:
        self._taken.clear()
        made: list[Any] = []

        def answers() -> Any:
            if not made:
                bases = self._taken.get("bases", [None] * len(self._live))
                values = [
                    extrapolate(each, weights, shape, base)
                    for each, shape, base in zip(features, self._shapes, bases, strict=True)
                ]
                made.append(fill_live(copied(self._forms) if self._writes else self._forms, self._live, values))
            return made[0]

        self._answers = answers
        try:
            with swapped(self._stubs):
                return run(args, kwargs)
        finally:
            self._answers = None
            self._taken.clear()


def _first_entered(discovery: Discovery, live: Sequence[Live], leaving: list[Tensor]) -> tuple[int, list[Tensor]]:
    """The first block that is entered by tensors of the shapes of what leaves, and all that enters it."""
    for number, block in enumerate(discovery.blocks):
        entering = discovery.entered.get(block.place)
        if entering is not None and None not in _bases(live, leaving, entering):
            return number, entering
    raise NoSeamError("granularity must be model or output for this model, as nothing of the shape of what leaves its "
                      "blocks enters one")  # fmt: skip


def _bases(live: Sequence[Live], leaving: list[Tensor], entering: list[Tensor]) -> list[Live | None]:
    """For each tensor that leaves that of its shape which enters and differs least from it; None without one.

    Where a part of the tokens is read alone, as that of the image in one sequence with the text, these tokens enter by
    themselves or as the same part.
    """
    chosen: list[Live | None] = []
    for one in live:
        value, whole = one.of(leaving), leaving[one.number]
        alike = [Live(i, None) for i, tensor in enumerate(entering) if tensor.shape == value.shape]
        if one.rows is not None:
            alike += [Live(i, one.rows) for i, tensor in enumerate(entering) if tensor.shape == whole.shape]
        alike = [base for base in alike if base not in chosen and entering[base.number].dtype == value.dtype]
        chosen.append(min(alike, key=lambda base: float((value - base.of(entering)).norm()), default=None))
    return chosen


def make_seams(config: CacheConfig, discovery: Discovery) -> list[Seam]:
    """The seam that a granularity names; for Δ-DiT (arXiv 2406.01125) those of the rear and of the front blocks.

    Raises:
        NoSeamError: the model cannot be cut there; the message names what can be done.
        UserError: more blocks to skip than there are.
    """
    depth = len(discovery.blocks)
    if config.cache == "delta-dit":
        first = _first_of_stream(discovery)
        config.check_depth(depth - first)
        count = config.resolved_cached_blocks(depth - first)
        return [
            Group(discovery, depth - count, depth, based=True),
            Group(discovery, first, first + count, based=True),
        ]
    if config.granularity == "module":
        return [PerModule(discovery)]
    return [Group(discovery, 0, depth, based=config.granularity == "block")]


def _first_of_stream(discovery: Discovery) -> int:
    """The first block of the stream that ends in the answer: blocks before it refine the text, say."""
    try:
        leaving = floats(list(discovery.sinks.values()))
        return _first_entered(discovery, discovery.live, leaving)[0]
    except NoSeamError:
        return 0


def _describe(count: int, whole: bool, based: bool, values: list[Tensor]) -> str:
    what = "what is added by" if based else "tokens after"
    shapes = ", ".join("×".join(map(str, value.shape)) for value in values)
    return f"{what} {_count(count, 'block')} ({shapes})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
