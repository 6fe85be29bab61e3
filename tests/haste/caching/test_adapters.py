"""What a forecast call puts in place of a part of the model, against the definitions written out; public models."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import disable_cache, enable_cache
from haste.caching.adapters import BlockGroup, PerModule, WholeModel
from haste.caching.cached_module import CachedModule
from haste.errors import UserError
from haste.models import Family, build_model, registry
from haste.samplers import sample
from torch import Tensor, nn

STEPS = 6


@torch.no_grad()
def features(model, inputs) -> tuple[list, torch.Tensor]:
    """Of one full call: what every block adds, and the tokens after the last one."""
    x, t, y = inputs
    tokens, c = model.embed(x, t, y)
    added = []
    for block in model.blocks:
        before, tokens = tokens, block(tokens, c)[0]
        added.append(tokens - before)
    return added, tokens


@pytest.mark.parametrize("order", [0, 1])
@torch.no_grad()
def test_what_is_forecast_of_blocks_one_by_one_and_of_the_whole_model(order):
    """Full at steps 0, 1 and 5; at 3, two steps after the last full one, F + order·2·(F − F_old)."""
    model = small_sit(3).double()
    noise, labels = small_noise(dtype=torch.float64)
    inputs = [(noise * (1 - 0.1 * s), torch.full((2,), 1 - s / STEPS).double(), labels) for s in range(STEPS)]
    (old_added, old_last), (new_added, new_last) = features(model, inputs[0]), features(model, inputs[1])
    tokens, c = model.embed(*inputs[3])

    by_block = tokens
    for old, new in zip(old_added, new_added, strict=True):
        by_block = by_block + new + order * 2 * (new - old)
    last = new_last + order * 2 * (new_last - old_last)
    for granularity, expected in (("block", by_block), ("model", last)):
        cached = enable_cache(model, num_steps=STEPS, cache="taylor", granularity=granularity, interval=4, order=order)
        answers = [cached(*each).prediction for each in inputs[:4]]
        assert cached.full_steps == [0, 1]
        torch.testing.assert_close(answers[3], model.finish(expected, c), rtol=1e-6, atol=1e-7)


def test_what_each_granularity_keeps():
    model = small_sit(3)
    made = [enable_cache(model, cache="reuse", granularity=g).granularities[0] for g in ("module", "block", "model")]
    assert [type(granularity) for granularity in made] == [PerModule, BlockGroup, WholeModel]
    assert [granularity.modules for granularity in made] == [6, 1, 1]


# ---- Δ-DiT ----

DEPTH = 4


def delta(model, num_steps=None, **settings):
    return enable_cache(model, num_steps=num_steps, cache="delta-dit", **settings)


def delta_dit(model, x, y, num_steps: int, interval: int, gate: int, count: int) -> tuple[torch.Tensor, list[int]]:
    """Written out: Euler steps, Δ of the group in use, a full step every `interval` and where the group changes."""
    full, kept, group_before = [], None, None
    for step in range(num_steps):
        rear = num_steps - step > gate
        group = range(DEPTH - count, DEPTH) if rear else range(count)
        t = torch.full((len(x),), 1 - step / num_steps, dtype=x.dtype)
        tokens, c = model.embed(x, t, y)
        is_full = not full or rear != group_before or step - full[-1] == interval
        if is_full:
            full.append(step)
        for index, block in enumerate(model.blocks):
            if index not in group or is_full:
                if index == group[0]:
                    entering = tokens
                tokens = block(tokens, c)[0]
                if index == group[-1]:
                    kept = tokens - entering
            elif index == group[0]:
                tokens = tokens + kept
        group_before = rear
        x = x - model.finish(tokens, c) / num_steps
    return x, full


@pytest.mark.parametrize("interval, gate, count", [(2, 12, 3), (3, 13, 2), (4, 10, 1), (3, 0, 4), (2, 20, 3)])
@torch.no_grad()
def test_delta_dit_is_the_published_method(interval, gate, count):
    model = small_sit(DEPTH).double()
    noise, labels = small_noise(dtype=torch.float64)
    expected, full = delta_dit(model, noise, labels, 20, interval, gate, count)
    cached = delta(model, interval=interval, gate=gate, cached_blocks=count)
    torch.testing.assert_close(sample(cached, noise, labels, num_steps=20), expected, rtol=1e-6, atol=1e-6)
    assert cached.full_steps == full


def test_the_full_steps_of_the_published_setting_and_of_one_whose_group_changes_between_them():
    model = small_sit(DEPTH)
    noise, labels = small_noise()
    for settings, full in (
        ({}, list(range(0, 20, 2))),  # 20 steps, interval 2, gate 12: the change is where a full step is due anyway
        ({"interval": 3, "gate": 12}, [0, 3, 6, 8, 11, 14, 17]),
    ):
        cached = delta(model, **settings)
        sample(cached, noise, labels, num_steps=20)
        assert cached.full_steps == full


@torch.no_grad()
def test_a_forecast_step_runs_the_other_blocks_alone():
    model = small_sit(DEPTH)
    noise, labels = small_noise()
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    cached = delta(model, num_steps=4, interval=2, gate=2, cached_blocks=3)
    # the rear three are skipped first, then the front three
    for step, expected in enumerate(([0, 1, 2, 3], [0], [0, 1, 2, 3], [3])):
        ran.clear()
        cached(noise, torch.full((2,), 1 - step / 4), labels)
        assert ran == expected


def test_by_default_three_blocks_in_four_are_skipped():
    cached = delta(small_sit(DEPTH), num_steps=4)
    assert [(len(group.before), len(group.group), len(group.after)) for group in cached.granularities] == [
        (1, 3, 0), (0, 3, 1)
    ]  # fmt: skip


# ---- models of the public repositories, stood in for by small ones with their parts, names and forms of answer ----


class Block(nn.Module):
    """timm's names; attention gives its output alone, and the block the tokens alone."""

    def __init__(self, own) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.adaLN_modulation = own.norm1, own.norm2, own.mlp, own.adaLN_modulation
        self.attn = FirstOf(own.attn)

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class WritingBlock(Block):
    """The same, in the place of its input."""

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in self.adaLN_modulation(c).chunk(6, dim=1))
        x += gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x.add_(gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2))


class Projector(nn.Module):
    """iREPA's: a convolution over the grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(32, 48, 3, padding=1)

    def forward(self, tokens):
        grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
        return self.convolution(grid).flatten(2).transpose(1, 2)


class FirstOf(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class LabelEmbedder(nn.Module):
    def __init__(self, own) -> None:
        super().__init__()
        self.embedding_table = own.embedding_table

    def forward(self, labels, train):
        assert train is False
        return self.embedding_table(labels)


class PublicModel(nn.Module):
    """form: "sit" drops half of its channels, "dit" returns them all, "repa" and "irepa" also return projections of the
    first block's tokens, "odd" adds a residual."""

    def __init__(self, form: str, block: type[Block] = Block) -> None:
        super().__init__()
        own = small_sit(depth=3)
        self.form = form
        self.in_channels = 1
        self.x_embedder, self.t_embedder, self.pos_embed = own.x_embedder, own.t_embedder, own.pos_embed
        self.y_embedder = LabelEmbedder(own.y_embedder)
        self.blocks = nn.ModuleList(block(each) for each in own.blocks)
        self.final_layer = own.final_layer
        self.projectors = nn.ModuleList([Projector() if form == "irepa" else nn.Linear(32, 48)])
        channels = 2 if form in ("sit", "dit") else 1
        torch.manual_seed(1)
        self.final_layer.linear = nn.Linear(32, 4 * channels)
        self.out_channels = channels

    def unpatchify(self, x):
        x = x.reshape(len(x), 4, 4, 2, 2, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, 8, 8)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        projected = []
        for block in self.blocks:
            x = block(x, c)
            projected = projected or [projector(x) for projector in self.projectors]
        x = self.unpatchify(self.final_layer(x, c))
        if self.form == "odd":
            return x * 1.01
        if self.form == "sit":
            return x.chunk(2, dim=1)[0]
        return (x, projected) if self.form.endswith("repa") else x

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Guidance on the first channels, as DiT has it: both halves of the batch get the first one's image."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        label, null = eps.chunk(2)
        eps = null + cfg_scale * (label - null)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


def run(model, form: str = "", steps: int = 8, **settings) -> torch.Tensor:
    """A loop of somebody's own: Euler, calling the model as it likes to be called."""
    fast = enable_cache(model, num_steps=steps, **settings) if settings else model
    x, y = small_noise()
    for step in range(steps):
        out = fast(x, torch.full((2,), 1 - step / steps), y)
        x = x - (out[0] if form.endswith("repa") else out)[:, :1] / steps
    return x


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@pytest.mark.parametrize("form", ["sit", "dit", "repa", "irepa"])
@torch.no_grad()
def test_public_models_are_forecast_as_ours_is(form, granularity):
    model = PublicModel(form).eval()
    settings = {"cache": "taylor", "order": 1, "granularity": granularity}
    torch.testing.assert_close(run(model, form, **settings, interval=1), run(model, form), rtol=1e-4, atol=1e-5)
    own = small_sit(depth=3)
    if form.endswith("repa"):  # the same weights in our own model draw the same, forecasts and all
        own.final_layer.linear = model.final_layer.linear
        expected = run(own, "repa", **settings, interval=3)
        torch.testing.assert_close(run(model, form, **settings, interval=3), expected, rtol=1e-4, atol=1e-5)
    assert (run(model, form, **settings, interval=3) - run(model, form)).abs().max() > 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        *({"cache": "newton", "order": 1, "granularity": granularity} for granularity in ("module", "block", "model")),
        {"cache": "delta-dit", "cached_blocks": 2},
        {"cache": "delta-dit", "cached_blocks": 3, "gate": 0},
    ],
)
@torch.no_grad()
def test_blocks_that_write_to_their_input_draw_the_same(settings):
    images = [run(PublicModel("dit", block).eval(), "dit", interval=3, **settings) for block in (Block, WritingBlock)]
    assert torch.equal(*images)
    model = PublicModel("dit", WritingBlock).eval()
    full = run(model, "dit", **{**settings, "interval": 1})
    torch.testing.assert_close(full, run(model, "dit"), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_answer_keeps_its_form():
    x, y = small_noise()
    t = torch.ones(2)
    for form, channels in (("sit", 1), ("dit", 2)):
        model = PublicModel(form).eval()
        assert enable_cache(model, num_steps=3, cache="reuse", interval=2)(x, t, y).shape == (2, channels, 8, 8)
    fast = enable_cache(PublicModel("repa").eval(), num_steps=6, cache="reuse", interval=2)
    answers = [fast(x, t - step / 6, y) for step in range(3)]
    assert fast.report.forecast_calls == 1 and all(type(answer) is tuple and len(answer) == 2 for answer in answers)


@torch.no_grad()
def test_a_method_of_the_model_runs_on_the_cache():
    """DiT's guidance is a method that calls its own forward."""
    model = PublicModel("dit").eval()
    x, y = small_noise(4)
    y[2:] = 10
    fast = enable_cache(model, num_steps=4, cache="taylor", interval=3, order=1, granularity="model")
    for step in range(4):
        t = torch.full((4,), 1 - step / 4)
        guided = fast.forward_with_cfg(x, t, y, 2.0)
        if step < 2:
            torch.testing.assert_close(guided, model.forward_with_cfg(x, t, y, 2.0), rtol=1e-4, atol=1e-5)
    assert (fast.report.full_calls, fast.report.forecast_calls) == (2, 2)
    assert disable_cache(fast) is model


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@torch.no_grad()
def test_what_a_model_does_after_its_last_layer_is_done_in_every_call(granularity):
    model = PublicModel("odd").eval()
    fast = enable_cache(model, num_steps=4, cache="reuse", interval=4, granularity=granularity)
    x, y = small_noise()
    fast(x, torch.ones(2), y)
    model.form = ""
    expected = enable_cache(model, num_steps=4, cache="reuse", interval=4, granularity=granularity)
    expected(x, torch.ones(2), y)
    wanted = 1.01 * expected(x, 0.9 * torch.ones(2), y)
    model.form = "odd"
    assert torch.equal(fast(x, 0.9 * torch.ones(2), y), wanted)


class OwnFamily(Family):
    """A family of somebody's own, whose models are a SiT inside of something else."""

    name, title, sizes = "own", "Own", {}

    def build(self, config, z_dims=()):
        return nn.ModuleDict({"inner": small_sit(config["depth"])})

    def config_for(self, size, settings, data):
        return dict(size)

    def layout(self, config):
        raise NotImplementedError

    def cached(self, model):
        return model["inner"] if len(model["inner"].blocks) > 1 else None


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@torch.no_grad()
def test_a_registered_family_brings_its_own_parts(granularity, monkeypatch):
    monkeypatch.setitem(registry._FAMILIES, "own", OwnFamily())
    settings = {"cache": "newton", "order": 1, "interval": 3, "granularity": granularity}
    noise, labels = small_noise()
    model = build_model({"family": "own", "depth": 3}).eval()
    expected = sample(enable_cache(small_sit(3), **settings), noise, labels, num_steps=8)
    assert torch.equal(sample(enable_cache(model, **settings), noise, labels, num_steps=8), expected)
    without = enable_cache(build_model({"family": "own", "depth": 1}).eval(), **settings)
    assert isinstance(without, CachedModule)  # as any model that nothing is known of


def test_a_compiled_model_is_refused_with_the_way_to_do_it():
    with pytest.raises(UserError, match="model must not be wrapped by torch.compile"):
        enable_cache(torch.compile(small_sit()))


def test_a_model_whose_blocks_do_not_run_is_refused():
    model = PublicModel("dit").eval()
    model.forward = lambda x, t, y: x.repeat(1, 2, 1, 1)
    x, y = small_noise()
    for granularity in ("module", "model"):
        fast = enable_cache(model, num_steps=4, cache="reuse", interval=2, granularity=granularity)
        with pytest.raises(UserError, match="^granularity must be output for a PublicModel"):
            fast(x, torch.ones(2), y)


@torch.no_grad()
def test_gates_of_layers_that_are_no_plain_matrix_are_made_by_the_layers():
    """With an adapter, say."""
    x, y = small_noise()
    images = []
    for wrapped in (False, True):
        model = PublicModel("dit").eval()
        for block in model.blocks if wrapped else []:
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Sequential(block.adaLN_modulation[1]))
        images.append(run(model, "dit", cache="taylor", order=1, interval=3, granularity="module"))
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-6)


def test_what_the_model_itself_raises_is_its_own():
    with pytest.raises(RuntimeError) as caught:
        enable_cache(PublicModel("dit").eval(), num_steps=4, cache="reuse", interval=2)(
            torch.zeros(2, 1, 7, 7), torch.ones(2), torch.zeros(2, dtype=torch.int64)
        )
    assert not isinstance(caught.value, UserError)


def test_of_any_model_the_output_is_forecast():
    """A model that is a straight line in time is forecast exactly, and not run in between."""

    class Line(torch.nn.Linear):
        def forward(self, x, t, y):
            calls.append(t[0].item())
            return torch.ones_like(x) * (self.weight.sum() * t + y).view(-1, 1, 1, 1)

    calls, model = [], Line(2, 1).eval()
    x, y = small_noise()
    times = [1 - step / 8 for step in range(8)]
    fast = enable_cache(model, times=times, cache="newton", granularity="output", full_steps="0,1,5", order=1)
    for time in times:
        t = torch.full((2,), time)
        torch.testing.assert_close(
            fast(x, t, y.float()), torch.ones_like(x) * (model.weight.sum() * t + y).view(-1, 1, 1, 1)
        )
    assert calls == [times[step] for step in (0, 1, 5)] and fast.report.forecast_calls == 5


@torch.no_grad()
def test_an_output_of_another_shape_than_the_input_is_forecast():
    model = PublicModel("dit").eval()
    images = run(model, "dit", cache="taylor", granularity="output", order=1, interval=3)
    assert images.shape == (2, 1, 8, 8) and 0 < (images - run(model, "dit")).norm() < 0.5 * images.norm()


def test_a_model_without_parameters_is_cached_by_its_output() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return x * t.view(-1, 1, 1, 1)

    fast = enable_cache(Scale().eval(), num_steps=4, cache="reuse", interval=2, granularity="output")
    x = torch.ones(2, 3, 8, 8)
    for step in range(4):
        assert fast(x, torch.full((2,), 1 - step / 4), None).shape == x.shape
