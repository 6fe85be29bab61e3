"""Granularity module, held against TaylorSeer's recurrence with every module of a model forecast by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from haste.caching import enable_cache
from haste.caching.block_modules import PerModule
from haste.caching.block_table import CLASSES, DOUBLE, pieces
from haste.caching.discovery import Discovery, NoSeamError, floats, refill
from haste.caching.forecaster import CachedFeatures, Forecaster, Timestep
from haste.errors import UserError
from torch import nn

pytest.importorskip("diffusers")

INTERVAL, ORDER, FIRST, STEPS = 4, 2, 3, 12
FULL = [0, 1, 2, 6, 10]

# Of each class the modules that are forecast, in whatever block: attention and MLP of image and text.
MODULES = {
    "FluxTransformer2DModel": ("attn", "ff", "ff_context", "proj_out"),
    "HunyuanVideoTransformer3DModel": ("attn", "ff", "ff_context", "proj_out"),
    "SD3Transformer2DModel": ("attn", "attn2", "ff", "ff_context"),
    "QwenImageTransformer2DModel": ("attn", "img_mlp", "txt_mlp"),
    "CogVideoXTransformer3DModel": ("attn1", "ff"),
    "CogView4Transformer2DModel": ("attn1", "ff"),
    "DiTTransformer2DModel": ("attn1", "ff"),
    "ChromaTransformer2DModel": ("attn", "ff", "ff_context", "proj_out"),
    "AuraFlowTransformer2DModel": ("ff", "ff_context"),
    "LuminaNextDiT2DModel": ("norm2", "ffn_norm2"),
    "PixArtTransformer2DModel": ("attn1", "attn2", "ff"),
    "SanaTransformer2DModel": ("attn1", "attn2", "ff"),
    "WanTransformer3DModel": ("attn1", "attn2", "ffn"),
    "LTXVideoTransformer3DModel": ("attn1", "attn2", "ff"),
    "Flux2Transformer2DModel": ("attn", "ff", "ff_context"),
    "Krea2Transformer2DModel": ("attn", "ff"),
}
SUMS = ("PixArt", "Sana", "Wan", "LTX", "Flux2", "Krea2")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Recurrence(nn.Module):
    """A module that is forecast as TaylorSeer publishes it: T_0 = F, T_{i+1} = (T_i − T_i,old) / d."""

    def __init__(self, module, clock):
        super().__init__()
        self.module, self.clock = module, clock
        self.terms = {}  # by the number of the call in the step: one by one T_i, each a list of tensors
        self.form, self.step, self.number = {}, -1, 0

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("module",) else getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        self.number = 0 if self.clock.step != self.step else self.number + 1
        self.step = self.clock.step
        if self.clock.is_full:
            output = self.module(*args, **kwargs)
            self.form[self.number] = output
            new, old = [[tensor.clone() for tensor in floats(output)]], self.terms.get(self.number, [])
            if self.step >= FIRST - 1:
                for i in range(min(ORDER, len(old))):
                    new.append([(a - b) / self.clock.distance for a, b in zip(new[i], old[i], strict=True)])
            self.terms[self.number] = new
            return output
        x, factor = self.step - self.clock.last, 1.0
        total = [torch.zeros_like(tensor) for tensor in self.terms[self.number][0]]
        for i, term in enumerate(self.terms[self.number]):
            factor = factor * x / i if i else 1.0
            total = [a + factor * b for a, b in zip(total, term, strict=True)]
        return refill(self.form[self.number], iter(total))


class Clock:
    def __init__(self):
        self.step, self.last, self.distance, self.is_full = -1, 0, 0, True

    def tick(self):
        self.step += 1
        self.is_full = self.step in FULL
        if self.is_full:
            self.distance, self.last = self.step - self.last, self.step


def with_recurrences(model, names, clock):
    blocks = {part for part in model.modules() if type(part).__name__.endswith("Block")}
    for block in blocks:
        for name in names:
            module = block._modules.get(name)
            if module is not None:
                block._modules[name] = Recurrence(module, clock)
    return model


def in_double(name, monkeypatch, **changes):
    """A tiny model and its call in float64, where no part of the model computes in float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    call = zoo.tiny_call(name)
    call.arguments = refill(call.arguments, (t.double() for t in floats(call.arguments)))
    return zoo.tiny_model(name, **changes).double(), call


def seam_of(model, call):
    def run(args, kwargs):
        return model(*args, **kwargs)

    return PerModule(Discovery(model, run, (), call.arguments)), run


class Loop:
    """A model that is called step by step with a seam."""

    def __init__(self, model, order=ORDER):
        self.model, self.clock, self.seam = model, Clock(), None
        self.forecaster = Forecaster("taylor", order, first=FIRST - 2)

    def run(self, args, kwargs):
        return self.model(*args, **kwargs)

    def __call__(self, **kwargs):
        self.clock.tick()
        if self.seam is None:
            self.seam = PerModule(Discovery(self.model, self.run, (), kwargs))
            (spec,) = self.seam.stores()
            self.features = CachedFeatures(spec.modules, self.forecaster.order + 1)
            self.features.reserve(*spec[1:])
        now = Timestep(self.clock.step, self.clock.step)
        if self.clock.is_full:
            out = self.features.storage[:, self.features.slot_for(now, [""])]
            return self.seam.full(self.run, (), kwargs, [out])
        weights = self.features.by_slot(self.forecaster.weights(self.features.timesteps(""), now), "")
        return self.seam.forecast(self.run, (), kwargs, [self.features.storage], torch.tensor(weights))


def assert_as_published(name, monkeypatch, **changes):
    model, call = in_double(name, monkeypatch, **changes)
    loop, clock = Loop(model), Clock()
    published = with_recurrences(in_double(name, monkeypatch, **changes)[0], MODULES[name], clock)

    def step(**kwargs):
        clock.tick()
        return published(**kwargs)

    ours, theirs = zoo.sample(model, call, STEPS, loop), zoo.sample(published, call, STEPS, step)
    plain = zoo.sample(model, call, STEPS)
    for number, (answer, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert (answer[0] - expected[0]).norm() < 1e-9 * expected[0].norm(), number
    assert all(torch.equal(ours[number][0], plain[number][0]) for number in FULL[:3])
    assert (ours[3][0] - plain[3][0]).norm() > 1e-6 * plain[3][0].norm()  # a forecast, not the model
    return loop.seam


@pytest.mark.parametrize("name", MODULES)
def test_published_recurrence(name, monkeypatch):
    seam = assert_as_published(name, monkeypatch)
    assert ("sums" in seam.description) == name.startswith(SUMS)


@pytest.mark.parametrize("name", MODULES)
def test_every_step_full_is_the_model(name):
    model, call = zoo.tiny_model(name), zoo.tiny_call(name)
    times = call.times(3)
    cached = enable_cache(model, times=times[:-1], cache="taylor", granularity="module", interval=1)
    for ours, plain in zip(zoo.sample(model, call, times, cached), zoo.sample(model, call, times), strict=True):
        assert all(map(torch.equal, ours, plain))
    assert cached.report.full_steps == [0, 1, 2]


def test_second_attention_of_sd3(monkeypatch):
    seam = assert_as_published("SD3Transformer2DModel", monkeypatch, dual_attention_layers=(0, 2))
    assert seam.stores()[0].modules == 10


def test_shared_modulation_keeps_three_features():
    for name, modules in (("PixArtTransformer2DModel", 3), ("Flux2Transformer2DModel", 3)):
        few, many = (zoo.tiny_model(name, num_layers=layers) for layers in (2, 5))
        assert [seam_of(model, zoo.tiny_call(name))[0].stores()[0].modules for model in (few, many)] == [modules] * 2


def test_what_enters_between_blocks_enters_at_its_present_value(monkeypatch):
    """A ControlNet's residuals of a forecast step are those of that step."""
    original = zoo.Call.at

    def at(call, x, time, following=0.0):
        moved = original(call, x, time, following)
        generator = torch.Generator().manual_seed(int(1000 * time))
        residual = torch.randn(*x.shape[:2], 32, generator=generator, dtype=x.dtype)
        return {**moved, "controlnet_block_samples": [residual] * 3, "controlnet_single_block_samples": [residual] * 3}

    monkeypatch.setattr(zoo.Call, "at", at)
    assert_as_published("FluxTransformer2DModel", monkeypatch)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel", "WanTransformer3DModel"])
def test_bfloat16(name):
    exact, call = zoo.tiny_model(name), zoo.tiny_call(name)
    rounded = zoo.tiny_model(name).to(torch.bfloat16)
    expected = zoo.sample(exact, call, STEPS, Loop(exact, order=1))
    call.arguments = refill(call.arguments, (t.bfloat16() for t in floats(call.arguments)))
    loop = Loop(rounded, order=1)
    answers = zoo.sample(rounded, call, STEPS, loop)
    assert loop.seam.stores()[0].dtype == torch.bfloat16
    errors = [(a[0].float() - b[0]).norm() / b[0].norm() for a, b in zip(answers, expected, strict=True)]
    assert max(errors) < 0.2


def test_pieces_of_a_linear_layer():
    linear, x = nn.Linear(4, 24), torch.randn(2, 4)
    expected = linear(x).chunk(6, dim=1)
    seen = []
    for _ in range(2):  # of a plain layer, then of one with a hook, which must see the call
        second, last = pieces(linear, x, 6, (1, 5))
        torch.testing.assert_close(second, expected[1])
        torch.testing.assert_close(last, expected[5])
        linear.register_forward_hook(lambda *_: seen.append(1))
    assert seen == [1]


def test_an_adapter_that_is_loaded_later_counts():
    model, call = zoo.tiny_model("FluxTransformer2DModel"), zoo.tiny_call("FluxTransformer2DModel")
    seam, run = seam_of(model, call)
    out = torch.zeros(seam.stores()[0][:4])
    seam.full(run, (), call.arguments, [out])
    for block in model.single_transformer_blocks:
        block.proj_out = nn.Sequential(block.proj_out, nn.Linear(32, 32))
        block.norm.linear = nn.Sequential(block.norm.linear, nn.Linear(96, 96))
    changed = torch.zeros_like(out)
    answer = seam.full(run, (), call.arguments, [changed])
    assert torch.equal(out[:6], changed[:6])
    assert not torch.equal(out[6:], changed[6:])
    forecast = seam.forecast(run, (), call.arguments, [changed.unsqueeze(1)], torch.ones(1))
    torch.testing.assert_close(forecast[0], answer[0])


def test_nothing_stays_behind():
    model, call = zoo.tiny_model("FluxTransformer2DModel"), zoo.tiny_call("FluxTransformer2DModel")
    before = {name: (type(module), list(module._forward_hooks)) for name, module in model.named_modules()}
    seam, run = seam_of(model, call)
    out = torch.zeros(seam.stores()[0][:4])
    seam.full(run, (), call.arguments, [out])

    def fails(args, kwargs):
        model(*args, **kwargs)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        seam.full(fails, (), call.arguments, [out])
    with pytest.raises(RuntimeError, match="luck"):
        seam.forecast(fails, (), call.arguments, [out.unsqueeze(1)], torch.ones(1))
    assert before == {name: (type(module), list(module._forward_hooks)) for name, module in model.named_modules()}


# ---- refusals ----


def assert_refused(model, call, *words):
    with pytest.raises(NoSeamError, match="granularity must be model") as refusal:
        seam_of(model, call)
    assert all(word in str(refusal.value) for word in words)


def test_class_without_an_entry_is_refused():
    name = "HunyuanDiT2DModel"
    assert_refused(zoo.tiny_model(name), zoo.tiny_call(name), "HunyuanDiTBlock")


@pytest.mark.parametrize("entry", [
    replace(DOUBLE, gates=lambda block, a: [gate * 1.01 for gate in DOUBLE.gates(block, a)]),
    replace(DOUBLE, gates=lambda block, a: DOUBLE.gates(block, a)[::-1]),
    replace(DOUBLE, modules=("attn",), gates=lambda block, a: DOUBLE.gates(block, a)[:1]),
])  # fmt: skip
def test_wrong_entry_is_refused(entry, monkeypatch):
    monkeypatch.setitem(CLASSES, "FluxTransformerBlock", entry)
    name = "FluxTransformer2DModel"
    assert_refused(zoo.tiny_model(name), zoo.tiny_call(name), "FluxSingleTransformerBlock")


def test_wrong_constants_are_refused(monkeypatch):
    entry = CLASSES["WanTransformerBlock"]
    wrong = replace(entry, tables=lambda block: [1.0, 1.0, block.scale_shift_table[0, 5]])
    monkeypatch.setitem(CLASSES, "WanTransformerBlock", wrong)
    name = "WanTransformer3DModel"
    assert_refused(zoo.tiny_model(name), zoo.tiny_call(name), "WanTransformerBlock")


def test_compiled_blocks_are_refused():
    model, call = zoo.tiny_model("FluxTransformer2DModel"), zoo.tiny_call("FluxTransformer2DModel")
    model.transformer_blocks[1].compile(backend="eager")
    assert_refused(model, call, "FluxTransformerBlock", "compiled")


def test_compiled_model_is_refused():
    model, call = zoo.tiny_model("FluxTransformer2DModel"), zoo.tiny_call("FluxTransformer2DModel")
    seam, _ = seam_of(model, call)
    with pytest.raises(UserError, match="granularity"):  # as a compiled model calls no hook
        seam.full(lambda args, kwargs: None, (), call.arguments, [torch.zeros(seam.stores()[0][:4])])


def test_chunked_feed_forward_is_refused():
    model, call = zoo.tiny_model("SD3Transformer2DModel"), zoo.tiny_call("SD3Transformer2DModel")
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, dim=1)
    assert_refused(model, call, "JointTransformerBlock", "ff")


def test_modulation_per_token_is_refused():
    model, call = zoo.tiny_model("WanTransformer3DModel"), zoo.tiny_call("WanTransformer3DModel")
    call.arguments["timestep"] = call.arguments["timestep"][:, None].expand(1, 128)
    assert_refused(model, call, "WanTransformerBlock", "token")
