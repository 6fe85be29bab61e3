"""The memory of a cache is known before its first step, also of a model that has no weights, and refused in time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from haste.caching import FAST, CacheConfig, cache_bytes, enable_cache, memory
from haste.caching.discovery import NoSeamError
from haste.errors import UserError
from torch import nn
from zoo import tiny_call, tiny_model

diffusers = pytest.importorskip("diffusers")

MIB, GIB = 2**20, 2**30
CLASSES = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "CogVideoXTransformer3DModel",
)


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def run(name, config, steps=8):
    model, call = tiny_model(name), tiny_call(name)
    fast = enable_cache(model, config, num_steps=steps)
    with torch.no_grad():
        for time in call.times(steps)[:-1]:
            fast(**call.at(call.latents, time))
    return fast.report


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("granularity", ["output", "model", "block", "module"])
def test_as_much_is_announced_as_is_held(name, granularity):
    config = CacheConfig(cache="taylor", granularity=granularity, order=1, interval=3)
    announced = cache_bytes(tiny_model(name), config, tiny_call(name).arguments)
    assert announced > 0
    without_values = {argument: on_meta(value) for argument, value in tiny_call(name).arguments.items()}
    assert cache_bytes(tiny_model(name).to("meta"), config, without_values) == announced
    assert run(name, config).mib * MIB == announced


def test_delta_dit_holds_one_group_at_a_time():
    config = CacheConfig(cache="delta-dit", interval=2)
    name = "PixArtTransformer2DModel"
    announced = cache_bytes(tiny_model(name), config, tiny_call(name).arguments)
    assert run(name, config).mib * MIB == announced > 0


def test_guidance_in_two_calls_holds_twice_as_much():
    model, inputs = tiny_model("FluxTransformer2DModel"), tiny_call("FluxTransformer2DModel").arguments
    assert cache_bytes(model, FAST, inputs, calls=2) == 2 * cache_bytes(model, FAST, inputs)
    assert cache_bytes(model, CacheConfig(), inputs) == 0


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def flux_1(side=64, text=512):
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).eval()
    inputs = {
        "hidden_states": meta(1, side**2, 64), "timestep": meta(1), "guidance": meta(1, dtype=torch.float32),
        "encoder_hidden_states": meta(1, text, 4096), "pooled_projections": meta(1, 768),
        "img_ids": meta(side**2, 3), "txt_ids": meta(text, 3), "return_dict": False,
    }  # fmt: skip
    return model, inputs


def hunyuan_video(frames, height, width):
    with torch.device("meta"):
        model = diffusers.HunyuanVideoTransformer3DModel().to(torch.bfloat16).eval()
    inputs = {
        "hidden_states": meta(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8),
        "timestep": meta(1, dtype=torch.long), "guidance": meta(1),
        "encoder_hidden_states": meta(1, 256, 4096), "pooled_projections": meta(1, 768),
        "encoder_attention_mask": meta(1, 256), "return_dict": False,
    }  # fmt: skip
    return model, inputs


@pytest.mark.parametrize(
    ("make", "granularity", "size"),
    [
        (flux_1, "model", 48 * MIB),
        (flux_1, "block", 48 * MIB),
        (flux_1, "output", MIB),
        (flux_1, "module", 3.5625 * GIB),
        (partial(hunyuan_video, 65, 480, 640), "module", 18.7 * GIB),
        (partial(hunyuan_video, 65, 480, 640), "model", 239 * MIB),
        (partial(hunyuan_video, 65, 480, 640), "output", 5 * MIB),
        (partial(hunyuan_video, 129, 720, 1280), "model", 1392 * MIB),
    ],
)
def test_published_sizes_on_the_meta_device(make, granularity, size):
    config = CacheConfig(cache="taylor", granularity=granularity, order=1)
    model, inputs = make()
    assert cache_bytes(model, config, inputs) == pytest.approx(size, rel=0.011)


class Skipping(nn.Module):
    """Its answer reads what the first block returns, beside the last."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, timestep):
        first = self.blocks[0](x)
        return first + self.blocks[2](self.blocks[1](first))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_reads_more_than_its_last_block_is_refused(device):
    model = Skipping().to(device).eval()
    inputs = {"x": torch.ones(1, 5, 4, device=device), "timestep": torch.ones(1, device=device)}
    with pytest.raises(NoSeamError, match="granularity must be output"):
        cache_bytes(model, FAST, inputs)


class InPlace(nn.Module):
    """Of what its last block returns it reads the later tokens, after it has written to them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x)
        x.mul_(2)
        return x[:, 2:] + 1


def test_rows_that_are_written_to_are_read():
    model = InPlace().to("meta").eval()
    inputs = {"x": torch.ones(1, 5, 4, device="meta"), "timestep": torch.ones(1, device="meta")}
    config = CacheConfig(cache="reuse", granularity="model")
    assert cache_bytes(model, config, inputs) in (5 * 4 * 4, 3 * 4 * 4)


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch, granularity):
    name = "FluxTransformer2DModel"
    config = CacheConfig(cache="taylor", granularity=granularity, order=1, interval=3)
    inputs = tiny_call(name).arguments
    announced = cache_bytes(tiny_model(name), config, inputs)
    output = cache_bytes(tiny_model(name), CacheConfig(cache="taylor", granularity="output", order=1), inputs)
    if granularity == "module":
        monkeypatch.setattr(memory, "free_bytes", lambda device: announced - 1)
        with pytest.raises(UserError, match="take granularity model, which takes"):
            run(name, config)
    monkeypatch.setattr(memory, "free_bytes", lambda device: output)
    with pytest.raises(UserError, match="take granularity output, which takes"):
        run(name, config)
    monkeypatch.setattr(memory, "free_bytes", lambda device: output - 1)
    with pytest.raises(UserError, match="take a lower order or smaller images"):
        run(name, config)


def test_inputs_that_are_no_arguments_are_refused():
    model = tiny_model("FluxTransformer2DModel")
    with pytest.raises(UserError, match="inputs must be the keyword arguments of a call"):
        cache_bytes(model, FAST, 2)
    with pytest.raises(UserError, match="inputs must be the keyword arguments of a call"):
        cache_bytes(model, FAST, (torch.ones(2),))
