"""What is found out about a model by running it: its blocks, and what the rest of it reads of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from haste.caching.discovery import (
    Discovery,
    Live,
    NoSeamError,
    Place,
    find_parts,
    floats,
    hollow,
    refill,
    stub,
    swapped,
    tensors,
)
from torch import Tensor, nn

DIM = 6


class Block(nn.Module):
    """Adds to its input, as a residual block does; in place, if asked."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.in_place = in_place

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:
        added = torch.tanh(self.linear(hidden)) * c
        return hidden.add_(added) if self.in_place else hidden + added


class Tower(nn.Module):
    """Text and image tokens in one sequence, of which the image's are read; `reads` breaks the chain on purpose."""

    def __init__(self, depth: int = 3, in_place: bool = False, reads: str = "last") -> None:
        super().__init__()
        self.embed_x, self.embed_text, self.embed_t = nn.Linear(4, DIM), nn.Linear(4, DIM), nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(depth))
        self.tail = nn.Linear(DIM, 4)
        self.reads = reads

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        c = self.embed_t(timestep.view(-1, 1, 1))
        hidden, first = torch.cat([self.embed_text(text), self.embed_x(x)], 1), None
        for block in self.blocks:
            hidden = block(hidden, c)
            first = hidden.clone() if first is None else first
        if self.reads == "first too":
            hidden = hidden + first
        return self.tail(hidden[:, text.shape[1] :])


def call(text_tokens: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 5, 4, generator=generator), torch.randn(2, text_tokens, 4, generator=generator)
    return {"x": x, "timestep": torch.tensor([0.5, 0.5]), "text": text}


def discover(model: nn.Module, kwargs: dict | None = None) -> Discovery:
    with torch.no_grad():
        return Discovery(model, lambda args, kwargs: model(*args, **kwargs), (), kwargs or call())


# ---- nested structures ----


class Pair(NamedTuple):
    a: Tensor
    b: object


@dataclass
class Output:
    sample: Tensor
    extra: object = None


class Mapped(OrderedDict):
    """Made of keywords, as diffusers' outputs are."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__(sample=sample)


ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])


@pytest.mark.parametrize(
    "value",
    [ONE, (ONE, None, [TWO]), Pair(ONE, {"k": TWO}), Output(ONE, (TWO, "s")), Mapped(ONE), [torch.tensor([3]), ONE]],
    ids=lambda value: type(value).__name__,
)
def test_tensors_of_nested_structures_are_found_and_replaced(value):
    new = refill(value, iter([tensor + 10 for tensor in floats(value)]))
    assert type(new) is type(value)
    assert [t.item() for t in tensors(new)] == [t.item() + 10 * t.is_floating_point() for t in tensors(value)]
    assert all(t.isnan().all() for t in floats(hollow(value)))


# ---- stubs ----


def test_a_stub_has_the_attributes_of_its_module_and_none_of_its_hooks():
    block = Block()
    block.register_forward_hook(lambda *_: pytest.fail("the block's hook ran"))
    stand_in = stub(block, lambda args, kwargs: ("answer", args))
    assert stand_in.linear is block.linear and isinstance(stand_in, Block) and type(stand_in).__name__ == "Block"
    assert stand_in(1) == ("answer", (1,))


def test_stubs_are_gone_after_an_error():
    model = Tower()
    before, keys = list(model.blocks), list(model.state_dict())
    with pytest.raises(ZeroDivisionError), swapped({Place(model.blocks, "1"): stub(before[1], lambda a, k: 1 / 0)}):
        model(**call())
    assert list(model.blocks) == before and list(model.state_dict()) == keys


# ---- blocks ----


def test_blocks_are_those_of_the_lists_nearest_to_the_root():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit = Tower(2)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # layers, not blocks

    model = Wrapped()
    parts = find_parts(model)
    assert [place.module for place in parts.blocks] == list(model.dit.blocks)
    assert {place.name for place in parts.others} == {"head", "embed_x", "embed_text", "embed_t", "tail"}
    model = Tower()
    model.embed_x = nn.Sequential(OrderedDict(refiners=nn.ModuleList([Block()])))  # a list further down
    assert [place.module for place in find_parts(model).blocks] == list(model.blocks)
    model.blocks = nn.Sequential(*model.blocks)
    assert [place.module for place in find_parts(model).blocks] == list(model.blocks)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_last_block_decides_by_its_image_rows(in_place):
    model = Tower(in_place=in_place)
    found = discover(model)
    assert torch.equal(found.answer, model(**call()))
    assert [executed.place.name for executed in found.blocks] == ["0", "1", "2"]
    assert [place.name for place in found.sinks] == ["2"]
    assert found.live == [Live(0, slice(3, None))]


def test_of_several_lists_the_last_blocks_may_decide_together():
    class Two(Tower):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            c, hidden, added = self.embed_t(timestep.view(-1, 1, 1)), self.embed_x(x), 0
            for block, side in zip(self.blocks, self.sides, strict=True):
                hidden = block(hidden, c)
                added = side(hidden, c)
            return self.tail(hidden + added)

    model = Two()
    model.sides = nn.ModuleList(Block() for _ in range(3))
    found = discover(model)
    assert len(found.sinks) == 2 and len(found.live) == 2


def test_what_reads_another_block_is_refused():
    with pytest.raises(NoSeamError, match="granularity must be output"):
        discover(Tower(reads="first too"))


def test_a_model_without_blocks_is_refused():
    model = nn.Module()
    model.forward = lambda x: x
    with pytest.raises(NoSeamError, match="granularity must be output"):
        discover(model, {"x": torch.ones(2)})


def test_a_model_that_empties_its_arguments_is_run_on_copies_of_them():
    class Popping(Tower):
        def forward(self, x: Tensor, timestep: Tensor, extra: dict) -> Tensor:
            return super().forward(x.mul_(2), timestep, extra.pop("text"))

    given = call()
    given["extra"] = {"text": given.pop("text")}
    x = given["x"].clone()
    discover(Popping(), given)
    assert "text" in given["extra"] and torch.equal(given["x"], x)
