"""A cache around an MM-DiT, whose blocks pass on text and image, against what is defined written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from caching_models import small_mmdit, small_noise, small_text
from haste.caching import CacheConfig, cache_bytes, enable_cache
from haste.caching.cached_module import CachedModule
from haste.models import MMDiT
from haste.samplers import sample
from torch import Tensor, nn

STEPS = 6
NULL = torch.linspace(-1, 1, 36).view(3, 12)
GRANULARITIES = ("module", "block", "model", "output")
CACHES = {
    **{name: {"cache": "taylor", "granularity": name, "interval": 3, "order": 1} for name in GRANULARITIES},
    "delta-dit": {"cache": "delta-dit", "interval": 3, "gate": 6, "cached_blocks": 2},
}
each_cache = pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Noise (2, 1, 8, 8) and text features (2, 3, 12)."""
    return small_noise(dtype=dtype)[0], small_text(dtype=dtype)


# ---- full steps ----


@each_cache
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_interval_one_is_the_model(sampler, settings):
    """Bit for bit, but per module, where a gate is applied with one rounding less."""
    model = small_mmdit(3)
    noise, text = inputs(torch.float32)
    order = {} if settings["cache"] == "delta-dit" else {"order": 2}
    images = [
        sample(m, noise, text, num_steps=6, sampler=sampler, cfg_scale=2.0, guidance_low=0.5, null=NULL,
               generator=torch.Generator().manual_seed(2))
        for m in (model, enable_cache(model, **{**settings, "interval": 1, **order}))
    ]  # fmt: skip
    tolerance = 1e-5 if settings.get("granularity") == "module" else 0
    torch.testing.assert_close(images[0], images[1], rtol=tolerance, atol=tolerance)


# ---- forecasts ----


@torch.no_grad()
def features(model: MMDiT, x: Tensor, t: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of one full call, listened to from outside: the outputs of the image's attentions and MLPs before their gates,
    what every block adds to the image, and the image's last tokens."""
    modules, images = [], [model.tokens(x)]
    hooks = []
    for block in model.joint_blocks:
        for module in (block.x_block.attn.proj, block.x_block.mlp):
            hooks.append(module.register_forward_hook(lambda module, given, output: modules.append(output)))
        hooks.append(block.register_forward_hook(lambda module, given, output: images.append(output[1])))
    model(x, t, text)
    for hook in hooks:
        hook.remove()
    return modules, [after - before for before, after in zip(images, images[1:], strict=False)], images[-1]


@pytest.mark.parametrize("order", [0, 1])
@torch.no_grad()
def test_a_forecast_is_made_of_the_image_s_features(order):
    """Full at steps 0, 1 and 5; at 3, two steps after the last full one, F + order·2·(F − F_old), gated at its time."""
    model = small_mmdit(3).double()
    noise, text = inputs()
    calls = [(noise * (1 - 0.1 * s), torch.full((2,), 1 - s / STEPS).double(), text) for s in range(STEPS)]
    old, new = (features(model, *calls[step]) for step in (0, 1))

    def forecast(old: Tensor, new: Tensor) -> Tensor:
        return new + order * 2 * (new - old)

    x, t, _ = calls[3]
    c, by_block = model.conditioning(t, text), model.tokens(x)
    by_module = by_block
    for index, block in enumerate(model.joint_blocks):
        _, _, gate_attn, _, _, gate_mlp = (v[:, None] for v in block.x_block.adaLN_modulation(c).chunk(6, dim=1))
        by_module = by_module + gate_attn * forecast(old[0][2 * index], new[0][2 * index])
        by_module = by_module + gate_mlp * forecast(old[0][2 * index + 1], new[0][2 * index + 1])
        by_block = by_block + forecast(old[1][index], new[1][index])
    expected = {"module": by_module, "block": by_block, "model": forecast(old[2], new[2])}
    for granularity, tokens in expected.items():
        cached = enable_cache(model, num_steps=STEPS, cache="taylor", granularity=granularity, interval=4, order=order)
        answers = [cached(*call).prediction for call in calls[:4]]
        assert cached.full_steps == [0, 1]
        torch.testing.assert_close(answers[3], model.finish(tokens, c), rtol=1e-6, atol=1e-7)


def text_calls(model: MMDiT) -> list[str]:
    """A list that gets the names of the text's layers as they run."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if "context_" in name and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_forecast_step_runs_nothing_of_the_text(granularity):
    model = small_mmdit()
    ran = text_calls(model)
    noise, text = inputs(torch.float32)
    cached = enable_cache(model, num_steps=3, **{**CACHES[granularity], "first_enhance": 1, "order": 0})
    cached(noise, torch.ones(2), text)
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    first = [f"joint_blocks.0.context_block.{name}" for name in ("adaLN_modulation.1", *layers)]
    last = [f"joint_blocks.1.context_block.{name}" for name in ("adaLN_modulation.1", "attn.qkv")]
    assert sorted(ran) == sorted(["context_embedder", *first, *last])
    ran.clear()
    cached(noise, torch.full((2,), 0.5), text)
    assert ran == []


# ---- Δ-DiT ----

DEPTH = 4


@torch.no_grad()
def delta_dit(model: MMDiT, x: Tensor, context: Tensor, num_steps: int, interval: int, gate: int, count: int) -> Tensor:
    """Written out: Euler steps, the changes of both streams by the group in use, a full step every `interval` and where
    the group changes."""
    last_full, rear_before, change = None, None, (0, 0)
    for step in range(num_steps):
        rear = num_steps - step > gate
        group = range(DEPTH - count, DEPTH) if rear else range(count)
        t = torch.full((len(x),), 1 - step / num_steps, dtype=x.dtype)
        text, image, c = model.text(context), model.tokens(x), model.conditioning(t, context)
        full = last_full is None or rear != rear_before or step - last_full == interval
        last_full = step if full else last_full
        for index, block in enumerate(model.joint_blocks):
            if index == group[0]:
                entering = text, image
            if full or index not in group:
                text, image, _ = block(text, image, c)
            elif index == group[0]:
                text, image = text + change[0], image + change[1]
            if full and index == group[-1]:
                change = text - entering[0], image - entering[1]
        rear_before = rear
        x = x - model.finish(image, c) / num_steps
    return x


@pytest.mark.parametrize("interval, gate, count", [(2, 12, 3), (3, 13, 2), (4, 10, 1), (3, 0, 4), (2, 20, 3)])
def test_delta_dit_is_the_published_method(interval, gate, count):
    model = small_mmdit(DEPTH).double()
    noise, text = inputs()
    cached = enable_cache(model, cache="delta-dit", interval=interval, gate=gate, cached_blocks=count)
    expected = delta_dit(model, noise, text, 20, interval, gate, count)
    torch.testing.assert_close(sample(cached, noise, text, num_steps=20), expected, rtol=1e-6, atol=1e-6)
    assert (expected - sample(model, noise, text, num_steps=20)).abs().max() > 1e-4


def test_a_forecast_step_of_delta_dit_runs_of_the_text_what_other_blocks_read():
    """Behind the rear group nothing reads the text, so the block in front of it need not finish that."""
    model = small_mmdit(DEPTH)
    ran = text_calls(model)
    noise, text = inputs(torch.float32)
    cached = enable_cache(model, num_steps=4, cache="delta-dit", interval=2, gate=2, cached_blocks=2)
    blocks: list[list[str]] = []
    for step in range(4):
        ran.clear()
        cached(noise, torch.full((2,), 1 - step / 4), text)
        blocks.append([name.removeprefix("joint_blocks.")[:1] for name in ran if name.endswith(("qkv", "fc2"))])
    everything = ["0", "0", "1", "1", "2", "2", "3"]
    assert blocks == [everything, ["0", "0", "1"], everything, ["2", "2", "3"]]


def test_text_of_another_length_than_the_model_s_own_is_cached():
    model = small_mmdit(3).double()
    noise, text = inputs()[0], small_text(tokens=5, dtype=torch.float64)
    settings = {"cache": "delta-dit", "interval": 2, "cached_blocks": 2, "gate": 4}
    full = sample(model, noise, text, num_steps=8)
    images = sample(enable_cache(model, **settings), noise, text, num_steps=8)
    assert 0 < (images - full).norm() < 0.1 * full.norm()


# ---- guidance, schedules, types, memory ----


@each_cache
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_batched_and_separate_guidance_sample_the_same(sampler, settings):
    """Also where guidance begins late, so that the halves have different histories, and ends early."""
    model, images = small_mmdit(3).double(), []
    noise, text = inputs()
    for guidance in ("batched", "separate"):
        cached = enable_cache(model, **settings)
        images.append(
            sample(cached, noise, text, num_steps=14, sampler=sampler, cfg_scale=2.0, guidance_low=0.2,
                   guidance_high=0.7, null=NULL, guidance=guidance)
        )  # fmt: skip
    torch.testing.assert_close(images[0], images[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [CACHES["module"], CACHES["block"]])
def test_each_guided_half_is_forecast_from_its_own_history(settings):
    model = small_mmdit().double()
    noise, text = inputs()
    guided, *alone = (enable_cache(model, num_steps=8, **settings) for _ in range(3))
    null = NULL.double().expand(2, -1, -1)
    for step in range(8):
        t = torch.full((2,), 1 - step / 8, dtype=torch.float64)
        both = guided(noise.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text, null])).prediction
        halves = torch.cat([half(noise, t, y).prediction for half, y in zip(alone, (text, null), strict=True)])
        torch.testing.assert_close(both, halves, rtol=1e-9, atol=1e-9)


def test_an_error_threshold_decides_where_the_full_steps_are():
    model = small_mmdit().double()
    noise, text = inputs()
    full = sample(model, noise, text, num_steps=40)
    counts, errors = [], []
    for threshold in (1e-2, 1e-3, 1e-4):
        cached = enable_cache(model, cache="newton", granularity="module", order=2, error_threshold=threshold)
        errors.append((sample(cached, noise, text, num_steps=40) - full).norm().item())
        counts.append(cached.num_full)
    assert counts[0] < counts[1] < counts[2] <= 40 and errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name, depth", [("module", 1), ("delta-dit", 2)])
def test_compiled_without_a_graph_break_it_samples_the_same(name, depth):
    """Dynamo alone, which finds the breaks."""
    settings = {**CACHES[name], "cached_blocks": 1} if name == "delta-dit" else CACHES[name]
    model = small_mmdit(depth)
    noise, text = inputs(torch.float32)
    eager = sample(enable_cache(model, **settings), noise, text, num_steps=10)
    torch._dynamo.reset()
    compiled = enable_cache(model, **settings).compile(backend="eager")
    torch.testing.assert_close(sample(compiled, noise, text, num_steps=10), eager, rtol=1e-4, atol=1e-5)


@each_cache
def test_a_model_in_half_precision_takes_the_features_that_encoders_give(settings):
    noise, text = inputs(torch.float32)
    full = sample(small_mmdit(3), noise, text, num_steps=12)
    images = sample(enable_cache(small_mmdit(3).bfloat16(), **settings), noise, text, num_steps=12)
    assert (images - full).norm() < 0.1 * full.norm()


@each_cache
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_estimate_of_memory_is_the_most_that_a_run_takes(settings, cfg_scale):
    model = small_mmdit(3)
    noise, text = inputs(torch.float32)
    cached, taken = enable_cache(model, **settings), []
    sample(cached, noise, text, num_steps=10, cfg_scale=cfg_scale, null=NULL,
           observe=lambda *_: taken.append(cached.cache_bytes))  # fmt: skip
    rows = 2 if cfg_scale == 1 else 4
    assert max(taken) == cache_bytes(model, CacheConfig(**settings), rows, input_shape=(1, 8, 8))


# ---- MM-DiT of the public repositories, stood in for by a small one with its parts, names and calls ----


class PublicJointBlock(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.context_block, self.x_block = own.context_block, own.x_block
        self.mixed = [own]  # no submodule

    def forward(self, *args, **kwargs):
        return self.mix(*args, **kwargs)

    def mix(self, context, x, c):
        (own,) = self.mixed
        text, image, _ = own(context, x, c)
        return None if own.last else text, image


class PublicMMDiT(nn.Module):
    """Also returns projections of the tokens of a block in the middle."""

    def __init__(self, own: MMDiT) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.context_embedder = own.x_embedder, own.t_embedder, own.context_embedder
        self.register_buffer("pos_embed", own.pos_embed)
        self.joint_blocks = nn.ModuleList(PublicJointBlock(block) for block in own.joint_blocks)
        self.final_layer = own.final_layer
        self.projectors = nn.ModuleList([nn.Linear(32, 6)])
        self.unpatchify = own.finish

    def forward(self, x, t, y=None, context=None):
        x, c, context = self.x_embedder(x) + self.pos_embed, self.t_embedder(t), self.context_embedder(context)
        for index, block in enumerate(self.joint_blocks):
            context, x = block(context, x, c=c)
            if index == 1:
                projected = [projector(x) for projector in self.projectors]
        return self.unpatchify(x, c), projected


@torch.no_grad()
def run(model: nn.Module, steps: int = 8, **settings) -> Tensor:
    """A loop of somebody's own, by Euler."""
    fast = enable_cache(model, num_steps=steps, **settings) if settings else model
    x, text = inputs()
    for step in range(steps):
        t = torch.full((2,), 1 - step / steps, dtype=x.dtype)
        out = fast(x, t, context=text) if isinstance(model, PublicMMDiT) else fast(x, t, text)
        x = x - out[0] / steps
    return x


@each_cache
def test_public_mm_dit_is_forecast_as_ours_is(settings):
    """Found by running it: block(context, x, c=c) returns (context, x), and of the last one no context."""
    settings = {**settings, "gate": 4} if settings["cache"] == "delta-dit" else settings
    own = small_mmdit(3).double()
    public = PublicMMDiT(copy.deepcopy(own)).double().eval()
    assert isinstance(enable_cache(public, num_steps=8, **settings), CachedModule)
    torch.testing.assert_close(run(public), run(own), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(public, **{**settings, "interval": 1}), run(own), rtol=1e-9, atol=1e-9)
    forecast = run(public, **settings)
    torch.testing.assert_close(forecast, run(own, **settings), rtol=1e-6, atol=1e-7)
    assert (forecast - run(own)).abs().max() > 1e-5
