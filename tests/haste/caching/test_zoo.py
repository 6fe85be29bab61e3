"""The cache around the transformer classes of diffusers, and around models in which nothing may be left out."""

from __future__ import annotations

import functools

import haste
import pytest
import torch
from haste.errors import UserError
from torch import Tensor, nn
from zoo import CLASSES, Call, last_to_run, sample, tensors, tiny_call, tiny_model

# One of each kind: adaLN, shared modulation, joint attention, two lists of blocks, a video, lists as arguments, two
# answers, blocks with skip connections. All others: pytest --zoo.
FEW = (
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel",
    "SD3Transformer2DModel", "QwenImageTransformer2DModel", "HunyuanVideoTransformer3DModel", "WanTransformer3DModel",
    "CogVideoXTransformer3DModel", "SanaTransformer2DModel", "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel", "ZImageTransformer2DModel", "HunyuanDiT2DModel",
)  # fmt: skip
NEEDS_TORCHVISION = {"CosmosTransformer3DModel"}
# What leaves its blocks has a shape that enters none of them.
NO_BLOCK = {"ConsisIDTransformer3DModel"}

GRANULARITIES = ("output", "model", "block")
STEPS, FULL = 9, [0, 1, 4, 7]  # of interval 3, first_enhance 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(CLASSES) if metafunc.config.getoption("--zoo") else FEW)


def skip_unless_built(name: str) -> None:
    if name in NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")


@functools.cache
def plain_run(name: str) -> tuple[nn.Module, Call, list[list[Tensor]]]:
    """The model, its call, and its answers without a cache."""
    skip_unless_built(name)
    model, call = tiny_model(name), tiny_call(name)
    return model, call, sample(model, call, STEPS)


def cached_run(model: nn.Module, call: Call, steps: int = STEPS, **settings) -> tuple[list[list[Tensor]], list[int]]:
    """The answers with a cache, and which steps were full."""
    times = call.times(steps)
    with haste.cached(model, times=times[:-1], **settings) as fast:
        answers = sample(model, call, times, fast)
    return answers, list(fast.report.full_steps)


def assert_same(answers: list[list[Tensor]], others: list[list[Tensor]]) -> None:
    assert len(answers) == len(others)
    for step, (left, right) in enumerate(zip(answers, others, strict=True)):
        assert len(left) == len(right) and all(map(torch.equal, left, right)), f"step {step}"


def state(model: nn.Module) -> dict[str, object]:
    """All that enable_cache must put back: modules by name and identity, their classes and what hangs on them."""
    found: dict[str, object] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in vars(module).items() if key not in ("_modules", "_parameters")}
        found[name] = (
            id(module),
            type(module),
            sorted(own),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        found[f"{name} children"] = {child: id(value) for child, value in module._modules.items()}
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_step_full_is_the_model(name, granularity):
    model, call, plain = plain_run(name)
    if granularity == "block" and name in NO_BLOCK:
        with pytest.raises(UserError, match="granularity"):
            cached_run(model, call, cache="newton", granularity=granularity, interval=1, order=1)
        return
    before = state(model)
    answers, full = cached_run(model, call, cache="newton", granularity=granularity, interval=1, order=1)
    assert_same(answers, plain)
    assert full == list(range(STEPS))
    assert state(model) == before
    assert_same(sample(model, call, STEPS), plain)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forecast_steps_run(name, granularity):
    model, call, plain = plain_run(name)
    if granularity == "block" and name in NO_BLOCK:
        pytest.skip("refused, as tested above")
    settings = {"cache": "newton", "granularity": granularity, "interval": 3, "order": 1, "first_enhance": 2}
    before = state(model)
    answers, full = cached_run(model, call, **settings)
    assert full == FULL
    assert_same(answers[:2], plain[:2])
    for answer, right in zip(answers, plain, strict=True):
        assert [part.shape for part in answer] == [part.shape for part in right]
        assert all(part.isfinite().all() for part in answer)
    assert not torch.equal(answers[2][0], plain[2][0])
    assert state(model) == before


class LastBlock:
    """Gives, while it is entered, the answer that `model` would give if its last block returned what it did before."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ran, self.replace = model, [], False
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        blocks = [block for child in lists for block in child]
        self.hooks = [block.register_forward_hook(self.hook, always_call=False) for block in blocks]

    def hook(self, block, arguments, output):
        if not self.replace:
            self.ran.append((block, output))
        elif block is self.ran[-1][0]:
            return self.ran[-1][1]
        return None

    def __call__(self, **arguments) -> list[Tensor]:
        """The whole model, but for the last block's output, from the second call on that of the first."""
        answer = tensors(self.model(**arguments))
        self.replace = True
        return answer


# Two lists of blocks work side by side in them, or what leaves the blocks is no output of the last one.
NOT_FROM_THE_LAST = {"ConsisIDTransformer3DModel"}


@torch.no_grad()
def test_reuse_repeats_what_the_last_block_returned(name):
    """At another time and with other latents: the head still sees the new time."""
    model, call, _ = plain_run(name)
    if name in NOT_FROM_THE_LAST:
        pytest.skip("what leaves the blocks is no output of the last one")
    times = call.times(4)
    steps = [call.at(call.latents * (1 - i / 8), times[i], times[i + 1]) for i in range(3)]
    last = LastBlock(model)
    right = [[part.clone() for part in last(**step)] for step in steps]
    for hook in last.hooks:
        hook.remove()
    settings = {"cache": "reuse", "granularity": "model", "interval": 4, "first_enhance": 1}
    with haste.cached(model, times=times[:4], **settings) as fast:
        for step, answer in zip(steps, right, strict=True):
            torch.testing.assert_close(tensors(fast(**step)), answer, rtol=1e-5, atol=1e-5)


def test_reuse_of_the_output_repeats_it(name):
    model, call, plain = plain_run(name)
    answers, full = cached_run(model, call, cache="reuse", granularity="output", interval=3, first_enhance=1)
    assert full == [0, 3, 6]
    assert_same(answers[:3], [plain[0]] * 3)


class Raises(RuntimeError):
    pass


@pytest.mark.parametrize("step", [0, 1, 2, 3])  # full, full, forecast, forecast
def test_after_an_error_nothing_is_left_behind(name, step):
    model, call, plain = plain_run(name)
    before, calls = state(model), []

    def fail(module, arguments, output):
        calls.append(module)
        raise Raises

    times = call.times(STEPS)
    settings = {"cache": "newton", "granularity": "model", "interval": 4, "order": 1, "first_enhance": 2}
    with haste.cached(model, times=times[:-1], **settings) as fast:
        sample(model, call, times[: step + 1], fast)
        tail = last_to_run(model, lambda: model(**call.arguments))
        hook = tail.register_forward_hook(fail)
        with pytest.raises(Raises), torch.no_grad():
            fast(**call.at(call.latents, times[step], times[step + 1]))
        hook.remove()
        assert calls == [tail]
        again = sample(model, call, times, fast)
    fresh, _ = cached_run(model, call, **settings)
    assert_same(again, fresh)
    assert state(model) == before
    assert_same(sample(model, call, STEPS), plain)


# ---- models of anybody's, right and wrong ----

TOKENS, WIDTH = 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.tanh(self.mlp(x) * c)


class InPlaceBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x += torch.tanh(self.mlp(x) * c)
        return x


class Model(nn.Module):
    """Embeds x (B, TOKENS, WIDTH) and t (B,), runs the blocks, and has a head."""

    block: type[nn.Module] = Block

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t[:, None])[:, None]
        return self.head(self.run_blocks(self.embed(x), c) * (1 + c))

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class InPlace(Model):
    block = InPlaceBlock


class ReadsAnEarlierBlock(Model):
    """The head gets what the second block returned too."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, c)
            if number == 1:
                kept = x
        return x + kept


class RunsBlocksTwice(Model):
    """Only what the second round returns is read."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return super().run_blocks(super().run_blocks(x, c), c)


class ReadsTheEmbedding(Model):
    """A skip over all blocks is no fault: what is read is computed at every step."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return super().run_blocks(x, c) + x


class WritesBetween(Model):
    """Adds to what each block returned, in place."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
            x += 0.1 * c
        return x


class WritesToTheLast(Model):
    """What the head changes in place is not what is cached."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return super().run_blocks(x, c).mul_(2).add_(c)


class DictOfBlocks(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"layer{i}": block for i, block in enumerate(self.blocks)})

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x, c)
        return x


class HasThemInside(Model):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Module()
        self.trunk.layers = self.blocks
        del self.blocks

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in [*self.trunk.layers[:2], *self.trunk.layers[2:]]:
            x = block(x, c)
        return x


class KeepsItOnABlock(Model):
    """The head reads what the first block returned where the block has kept it."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.kept = block(x, c)
        return x + self.blocks[0].kept


class HidesNaN(Model):
    """What the head reads of an earlier block does not show as NaN."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        first = self.blocks[0](x, c)
        x = first
        for block in self.blocks[1:]:
            x = block(x, c)
        return x + torch.nan_to_num(first).mean()


class NoBlocks(Model):
    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return x


class Noisy(Model):
    """Does not return the same twice."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return super().run_blocks(x, c) + torch.randn(x.shape)


@torch.no_grad()
def own_loop(fast, steps: int = 9) -> list[Tensor]:
    x, answers = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)), []
    for i in range(steps):
        answers.append(fast(x, torch.full((2,), 1 - i / steps)).clone())
        x = x - answers[-1] / steps
    return answers


OWN_TIMES = [1 - i / 9 for i in range(9)]
WRONG = [ReadsAnEarlierBlock, KeepsItOnABlock, HidesNaN, NoBlocks, Noisy]


@pytest.mark.parametrize("granularity", ["model", "block"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_of_which_no_part_may_be_left_out_is_refused(wrong, granularity):
    model = wrong()
    before = state(model)
    with pytest.raises(UserError, match="granularity.*output|output.*granularity"):
        with haste.cached(model, times=OWN_TIMES, granularity=granularity) as fast:
            own_loop(fast)
    assert state(model) == before


@pytest.mark.parametrize("wrong", [w for w in WRONG if w is not Noisy])
def test_its_output_is_cached_all_the_same(wrong):
    model = wrong()
    plain = own_loop(model)
    with haste.cached(model, times=OWN_TIMES, granularity="output", cache="reuse", interval=3) as fast:
        answers = own_loop(fast)
    assert torch.equal(answers[0], plain[0]) and fast.report.full_steps == [0, 1, 4, 7]
    assert torch.equal(answers[3], answers[1])


RIGHT = [
    Model, InPlace, ReadsTheEmbedding, RunsBlocksTwice, WritesBetween, WritesToTheLast, DictOfBlocks, HasThemInside,
]  # fmt: skip


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_model_of_ones_own(right, granularity):
    model = right()
    if right is RunsBlocksTwice and granularity == "block":
        with (
            pytest.raises(UserError, match="granularity"),
            haste.cached(model, times=OWN_TIMES, granularity="block") as fast,
        ):
            own_loop(fast)
        return
    plain, before = own_loop(model), state(model)
    with haste.cached(model, times=OWN_TIMES, granularity=granularity, cache="newton", interval=1, order=1) as fast:
        answers = own_loop(fast)
    assert all(map(torch.equal, answers, plain))
    with haste.cached(model, times=OWN_TIMES, granularity=granularity, cache="newton", interval=3, order=1) as fast:
        answers = own_loop(fast)
    assert fast.report.full_steps == [0, 1, 4, 7]
    assert (answers[-1] - plain[-1]).norm() < 0.05 * plain[-1].norm()
    assert state(model) == before


@pytest.mark.parametrize("settings", [{"granularity": "model"}, {"granularity": "block"}, {"cache": "delta-dit"}])
def test_blocks_that_update_their_input_in_place_give_the_same_images(settings):
    """As blocks that return a new tensor, of which nothing that is cached can change later."""
    settings = {"cache": "newton", "order": 1, **settings} if "cache" not in settings else settings
    answers = []
    for kind in (Model, InPlace):
        with haste.cached(kind(), times=OWN_TIMES, interval=3, **settings) as fast:
            answers.append(torch.stack(own_loop(fast)))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
