"""What a model's blocks are, and what the rest of it reads of them: found by running it, not from a list of models.

One run finds the blocks in the order in which they are executed. Whether they can be skipped is then tried: stubs that
answer with NaN take their places, and the model's answer must stay as it is, bit for bit. So a model that no one has
seen before is either cut correctly or refused.

A stub is a shallow copy of a block with another forward pass, so that whatever the model reads of the block, such as a
submodule, is there. Stubs stand in the model for the length of a call and never longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from haste.errors import UserError

Run = Callable[[tuple, dict], Any]
"""run(args, kwargs) calls the model, without compilation."""


class NoSeamError(UserError):
    """A model that cannot be cached at a granularity; the message ends with the way out."""


# ---- the tensors of a nested structure ----


def tensors(value: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts(value) for tensor in tensors(part)]


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors among `tensors`."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def refill(value: Any, filling: Iterator[Tensor]) -> Any:
    """The same structure with its floating-point tensors taken from `filling`."""
    if isinstance(value, Tensor):
        return next(filling) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(refill(part, filling) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(refill(part, filling) for part in value)
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        return replace(value, **{name: refill(part, filling) for name, part in vars(value).items()})
    if isinstance(value, Mapping):  # diffusers' outputs are mappings that are made of keywords
        filled = {name: refill(part, filling) for name, part in value.items()}
        return filled if type(value) is dict else type(value)(**filled)
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    return list(vars(value).values()) if is_dataclass(value) and not isinstance(value, type) else []


def hollow(value: Any) -> Any:
    """The same structure of NaN tensors that take no memory: whatever reads them shows it."""
    nan = (tensor.new_full((), torch.nan).expand(tensor.shape) for tensor in floats(value))
    return refill(value, nan)


def copied(value: Any) -> Any:
    """The same structure with copies of its floating-point tensors."""
    return refill(value, (tensor.clone() for tensor in floats(value)))


# ---- stubs ----


class Place(NamedTuple):
    """Where a module hangs: the attribute `name` of `parent`."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)


Answer = Callable[[tuple, dict], Any]


@cache
def _stub_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.haste_answer(args, kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def stub(module: nn.Module, answer: Answer) -> nn.Module:
    """A module that looks like this one and returns answer(args, kwargs)."""
    made = nn.Module.__new__(_stub_class(type(module)))  # type: ignore[arg-type]
    # What others have put around the block's forward pass (hooks, offloading, compilation) is for the block alone.
    nn.Module.__init__(made)
    own = {"forward", "_compiled_call_impl", *made.__dict__} - {"training", "_parameters", "_buffers", "_modules"}
    made.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    made.__dict__["haste_answer"] = answer
    return made


@contextmanager
def swapped(stubs: Mapping[Place, nn.Module]) -> Iterator[None]:
    """Put modules in places of the model for the length of a call."""
    before = {place: place.module for place in stubs}
    try:
        for place, module in stubs.items():
            setattr(place.parent, place.name, module)
        yield
    finally:
        for place, module in before.items():
            setattr(place.parent, place.name, module)


# ---- the parts of a model ----


class Parts(NamedTuple):
    """The blocks of a model, which stand in lists, and its other modules of the same depth, such as embedders."""

    blocks: list[Place]
    others: list[Place]


def find_parts(model: nn.Module) -> Parts:
    """The lists of blocks nearest to the root: those of embedders further down are parts of these."""
    children = [Place(model, name) for name, _ in model.named_children()]
    lists = [place for place in children if is_block_list(place.module)]
    if lists:
        blocks = [Place(place.module, name) for place in lists for name, _ in place.module.named_children()]
        return Parts(blocks, [place for place in children if place not in lists])
    found = {place: find_parts(place.module) for place in children}
    with_blocks = [parts for parts in found.values() if parts.blocks]
    others = [place for place, parts in found.items() if not parts.blocks]
    return Parts(
        [block for parts in with_blocks for block in parts.blocks],
        others + [other for parts in with_blocks for other in parts.others],
    )


def is_block_list(module: nn.Module) -> bool:
    """A list, or a sequence or dictionary of several modules of one class that have parts of their own."""
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        return bool(children)
    alike = len({type(child) for child in children}) == 1
    several = isinstance(module, (nn.Sequential, nn.ModuleDict)) and len(children) > 1
    return several and alike and any(children[0].children())


# ---- one run of the model, watched ----


@dataclass(eq=False)
class Executed:
    """A module that ran: what it was called with and what it returned, as structures that take no memory."""

    place: Place
    entering: Any
    leaving: Any


class Discovery:
    """What one call of a model showed.

    Args:
        model: in eval mode.
        run: calls it.
        args, kwargs: of that call; kept for further tries until `forget`.

    Attributes:
        answer: what the model returned.
        blocks: those that ran, in order; without lists that are aside of the stream of tokens, such as projections of
            the text.
        others: the other modules that ran, in order.
        entered: copies of the tensors that enter a block, of the first block for each combination of shapes.
        lasts: what the last block of each list returned, in order of execution.
        sinks: the blocks whose outputs together decide the answer, with these outputs: the last block, or the last one
            of each list.
        live: which of the tensors that leave the sinks the model reads.
        writes: the model writes to what its blocks return, which then must have memory of its own.

    Raises:
        NoSeamError: no blocks ran, or the model reads more of them than what leaves the sinks.
    """

    def __init__(self, model: nn.Module, run: Run, args: tuple, kwargs: dict) -> None:
        self.run = run
        self._call = args, kwargs
        self._first_alone = False  # only the first tensor of the answer is wanted
        parts = find_parts(model)
        ran: list[Executed] = []
        self.lasts: dict[Place, Any] = {}
        self.blocks: list[Executed] = []
        self.entered: dict[Place, list[Tensor]] = {}
        self.writes = False
        shapes_seen = set()

        def watch(place: Place, is_block: bool) -> nn.Module:
            module = place.module

            def answer(args: tuple, kwargs: dict) -> Any:
                entering = hollow((args, kwargs))
                if is_block and (shapes := tuple(t.shape for t in floats(entering))) not in shapes_seen:
                    shapes_seen.add(shapes)
                    self.entered[place] = floats(copied((args, kwargs)))  # a block may write to its input
                leaving = module(*args, **kwargs)
                ran.append(Executed(place, entering, hollow(leaving)))
                if is_block:
                    self.blocks.append(ran[-1])
                    for other in [other for other in self.lasts if other.parent is place.parent]:
                        del self.lasts[other]
                    self.lasts[place] = copied(leaving)
                return leaving

            return stub(module, answer)

        watched = {place: watch(place, place in parts.blocks) for place in [*parts.blocks, *parts.others]}
        self.answer = self.again(watched)
        if not self.blocks:
            raise NoSeamError(f"granularity must be output for a {type(model).__name__}, which runs no list of blocks")
        self.others = [executed for executed in ran if executed not in self.blocks]
        self.sinks = self._find_sinks(type(model).__name__)
        self.live = self._live_rows()
        stream = [executed for executed in self.blocks if self._is_in_stream(executed)]
        self.others = [executed for executed in ran if executed not in stream]
        self.blocks = stream

    def again(self, stubs: Mapping[Place, nn.Module]) -> Any:
        """The answer to the call with these stubs in place."""
        args, kwargs = copied(self._call)  # the model may write to its arguments
        with swapped(stubs):
            return self.run(args, kwargs)

    def between(self, first: int, last: int) -> tuple[list[Tensor], Any]:
        """What enters block `first`, its tensors, and what leaves block last − 1, in another run."""
        seen: dict[str, Any] = {}
        blocks = self.blocks[first].place, self.blocks[last - 1].place

        def watch(place: Place) -> nn.Module:
            module = place.module

            def answer(args: tuple, kwargs: dict) -> Any:
                if place == blocks[0]:
                    seen["entering"] = floats(copied((args, kwargs)))
                leaving = module(*args, **kwargs)
                if place == blocks[1]:
                    seen["leaving"] = copied(leaving)
                return leaving

            return stub(module, answer)

        self.again({place: watch(place) for place in blocks})
        return seen["entering"], seen["leaving"]

    def holds(self, stubs: Mapping[Place, nn.Module]) -> bool:
        """Whether the model's answer stays as it is with these stubs in place."""
        try:
            answer = self.again(stubs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may do anything with what it does not expect
            return False
        return self.same(self.answer, answer)

    def same(self, a: Any, b: Any) -> bool:
        """Whether two answers are the same in all that is wanted of them."""
        return all(map(_same, self._wanted(a), self._wanted(b)))

    def _wanted(self, answer: Any) -> list[Tensor]:
        return tensors(answer)[:1] if self._first_alone else tensors(answer)

    def forget(self) -> None:
        """Let go of all tensors of the call."""
        self._call, self.answer, self.lasts, self.sinks, self.entered = ((), {}), None, {}, {}, {}

    # ---- what leaves the blocks ----

    def _find_sinks(self, name: str) -> dict[Place, Any]:
        """The last block, or the last of each list; of a tuple or list the first tensor may be all that they decide.

        The others, such as REPA's projections of a block in the middle, are then NaN on forecast calls.
        """
        last, *others = list(self.lasts)[::-1]
        several = isinstance(self.answer, (tuple, list))
        for self.writes in (False, True):
            for places in ([last], [last, *others]):
                sinks = {place: self.lasts[place] for place in places}
                for self._first_alone in (False, True)[: 1 + several]:
                    if self.holds(self.stubs_for(sinks)):
                        return sinks
        raise NoSeamError(f"granularity must be output for a {name}, whose answer depends on more than what its last "
                          "block returns")  # fmt: skip

    def leaving(self) -> list[Tensor]:
        """The tensors that leave the sinks and are read."""
        all_of_them = floats(list(self.sinks.values()))
        return [live.of(all_of_them) for live in self.live]

    def _is_in_stream(self, executed: Executed) -> bool:
        """Whether as many numbers leave it as leave the sinks, however they are arranged (video models do it twice)."""
        leaving = floats(executed.leaving)
        sizes = {tensor.numel() for tensor in [*self.leaving(), *floats(list(self.sinks.values()))]}
        unknown = any(tensor.is_meta for tensor in leaving)  # without values which rows are read
        return unknown or executed.place in self.sinks or any(tensor.numel() in sizes for tensor in leaving)

    def stubs_for(
        self, answers: Mapping[Place, Any], first: int = 0, last: int | None = None
    ) -> dict[Place, nn.Module]:
        """Stubs in place of the blocks first … last − 1, which return NaN but for these answers."""

        def answering(executed: Executed) -> Answer:
            value = answers.get(executed.place, executed.leaving)
            may_write = self.writes or executed.place in answers
            return lambda args, kwargs: copied(value) if may_write else value

        return {each.place: stub(each.place.module, answering(each)) for each in self.blocks[first:last]}

    def _live_rows(self) -> list[Live]:
        """Which of the tensors that leave the sinks the model reads, and which of their rows (tokens)."""
        leaving = floats(list(self.sinks.values()))
        seen = [block.entering for block in self.blocks] + [other.leaving for other in self.others]
        lengths = sorted({tensor.shape[1] for tensor in floats(seen) if tensor.dim() == 3})
        alive: list[Live] = []
        for index, tensor in enumerate(leaving):
            tries: list[slice | None] = [slice(0, 0)]  # nothing of it
            if tensor.dim() == 3:
                for n in (n for n in lengths if n < tensor.shape[1]):
                    tries += [slice(0, n), slice(tensor.shape[1] - n, None)]
            for part in (*tries, None):
                kept = torch.full_like(tensor, torch.nan)
                read = slice(None) if part is None else part
                if tensor.dim() > 1:
                    kept[:, read] = tensor[:, read]
                elif part is None:
                    kept = tensor
                tried = [kept if i == index else other for i, other in enumerate(leaving)]
                if self.holds(self.stubs_for(refill(self.sinks, iter(tried)))):
                    if part != slice(0, 0):
                        alive.append(Live(index, part))
                    break
        return alive


class Live(NamedTuple):
    """A tensor that is read, by its number among those that leave the sinks; rows: None is all."""

    number: int
    rows: slice | None

    def of(self, leaving: Sequence[Tensor]) -> Tensor:
        tensor = leaving[self.number]
        return tensor if self.rows is None else tensor[:, self.rows]


def fill_live(form: Any, live: Sequence[Live], values: Sequence[Tensor]) -> Any:
    """Outputs of this form with these values where the model reads them."""
    filled = floats(form)
    for (number, rows), value in zip(live, values, strict=True):
        if rows is None:
            filled[number] = value
        else:
            filled[number] = value.new_zeros(filled[number].shape)
            filled[number][:, rows] = value
    return refill(form, iter(filled))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; on a GPU, where kernels may sum in another order, but for rounding; on meta by shape."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    if a.device.type == "cpu" or not a.is_floating_point():
        return torch.equal(a, b)
    difference = (a.double() - b.double()).norm()
    return bool(difference <= 1e-2 * torch.finfo(a.dtype).eps ** 0.5 * a.double().norm())
