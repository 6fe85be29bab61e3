"""The cache and what else is done to a model: compilation, offloading, LoRA, saving, copying; and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import io

import accelerate
import haste
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from haste.errors import UserError
from pipelines import Spy, flux_transformer, tiny_pipeline
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import Call, sample, tiny_call, tiny_model

diffusers = pytest.importorskip("diffusers")

STEPS, FULL = 9, [0, 1, 4, 7]
SETTINGS = {"cache": "newton", "granularity": "model", "interval": 3, "order": 1, "first_enhance": 2}
NAME = "FluxTransformer2DModel"


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(NAME)


def cached_answers(model: nn.Module, call: Call | None = None, fast=None, **settings) -> Tensor:
    """Of STEPS steps, of a new cache or of `fast`."""
    call = call or tiny_call(NAME)
    times = call.times(STEPS)
    if fast is not None:
        return torch.stack([answer[0] for answer in sample(model, call, times, fast)])
    with haste.cached(model, times=times[:-1], **{**SETTINGS, **settings}) as fast:
        answers = torch.stack([answer[0] for answer in sample(model, call, times, fast)])
    assert list(fast.report.full_steps) == FULL
    return answers


def enable(model: nn.Module, **settings):
    return haste.enable_cache(model, times=tiny_call(NAME).times(STEPS)[:-1], **{**SETTINGS, **settings})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def no_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


GRANULARITIES = ("output", "model", "block")


# ---- compilation ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("regional", [True, False])
def test_a_compiled_model_stays_cached_and_compiles_nothing_twice(model, regional, granularity):
    right = cached_answers(model, granularity=granularity)
    if regional:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        model.compile(fullgraph=True, backend="eager")
    fast = enable(model, granularity=granularity)
    answers = [cached_answers(model, fast=fast)]
    compiled = graphs()
    assert compiled > 0
    answers += [cached_answers(model, fast=fast) for _ in range(2)]
    assert graphs() == compiled
    assert list(fast.report.full_steps) == FULL
    for each in answers:
        torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regional", [True, False])
def test_a_pipeline_compiled_while_its_cache_is_on(regional):
    tiny = tiny_pipeline("flux")
    handle = haste.enable_cache(tiny.pipe, **SETTINGS)
    right = tiny(STEPS)
    if regional:
        tiny.pipe.transformer.compile_repeated_blocks(backend="eager")
    else:
        tiny.pipe.transformer.compile(backend="eager")
    tiny(STEPS)
    compiled = graphs()
    assert compiled > 0
    torch.testing.assert_close(tiny(STEPS), right, rtol=1e-4, atol=1e-4)
    assert graphs() == compiled and list(handle.report.full_steps) == FULL


def test_ten_batch_sizes_of_a_compiled_model():
    """torch recompiles at most eight times, and would then run without a compilation or raise."""
    model, call = tiny_model(NAME), tiny_call(NAME)
    model.compile(backend="eager", fullgraph=True)
    fast = enable(model, granularity="model")
    for batch in range(1, 11):
        arguments = {
            key: value.repeat(batch, *[1] * (value.dim() - 1)) if key not in ("img_ids", "txt_ids") else value
            for key, value in call.arguments.items()
            if isinstance(value, Tensor)
        }
        answers = cached_answers(model, Call({**arguments, "return_dict": False}), fast)
        assert answers.shape[1] == batch
        assert list(fast.report.full_steps) == FULL


# ---- offloading ----


def test_accelerate_may_take_its_hooks_off_and_on_between_runs(model):
    right = cached_answers(model)
    fast = enable(model)
    assert torch.equal(cached_answers(model, fast=fast), right)
    for _ in range(2):
        accelerate.cpu_offload(model, execution_device="cpu")
        assert next(model.parameters()).is_meta
        assert torch.equal(cached_answers(model, fast=fast), right)
        remove_hook_from_submodules(model)
        assert torch.equal(cached_answers(model, fast=fast), right)
        assert list(fast.report.full_steps) == FULL
    haste.disable_cache(model)
    assert type(model) is diffusers.FluxTransformer2DModel


def hook_model_offload(pipe) -> None:
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def hook_sequential(pipe) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")


def remove_model_hook(pipe) -> None:
    accelerate.hooks.remove_hook_from_module(pipe.transformer)


def remove_sequential(pipe) -> None:
    remove_hook_from_submodules(pipe.transformer)


OFFLOADS = [(hook_model_offload, remove_model_hook), (hook_sequential, remove_sequential)]


@pytest.mark.parametrize(("hook", "remove"), OFFLOADS)
@pytest.mark.parametrize("before", [True, False])
def test_a_pipeline_stays_cached_through_offloading(hook, remove, before):
    """As enable_model_cpu_offload does it, which takes all hooks off and on again after every run."""
    tiny = tiny_pipeline("flux")
    spy = Spy(tiny)
    if before:
        hook(tiny.pipe)
    with haste.cached(tiny.pipe, **SETTINGS):
        right = None
        for _ in range(2):
            for change in (remove, hook) if before else (hook, remove):
                change(tiny.pipe)
                spy.clear()
                out = tiny(STEPS)
                right = out if right is None else right
                assert torch.equal(out, right) and spy.full() == FULL
    spy.clear()
    tiny(STEPS)
    assert spy.full() == list(range(STEPS))
    fresh = tiny_pipeline("flux")
    haste.enable_cache(fresh.pipe, **SETTINGS)
    assert torch.equal(fresh(STEPS), right)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("offload", ["block_level", "leaf_level"])
def test_diffusers_group_offloading(model, offload, granularity):
    right = cached_answers(model, granularity=granularity)
    groups = {"num_blocks_per_group": 1} if offload == "block_level" else {}
    cpu = torch.device("cpu")
    fast = enable(model, granularity=granularity)
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload, **groups)
    for _ in range(2):
        assert torch.equal(cached_answers(model, fast=fast), right)
        assert list(fast.report.full_steps) == FULL


# ---- weights, files, copies ----


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_is_loaded_and_unloaded_while_the_cache_is_on():
    from peft import LoraConfig

    def load(pipe) -> None:
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, "own")

    def unload(pipe) -> None:
        pipe.transformer.delete_adapters("own")

    tiny = tiny_pipeline("flux")
    haste.enable_cache(tiny.pipe, **SETTINGS)
    without = tiny(STEPS)
    load(tiny.pipe)
    adapted = tiny(STEPS)
    unload(tiny.pipe)
    assert torch.equal(tiny(STEPS), without)
    fresh = tiny_pipeline("flux")
    load(fresh.pipe)
    haste.enable_cache(fresh.pipe, **SETTINGS)
    assert torch.equal(fresh(STEPS), adapted) and not torch.equal(adapted, without)


def test_a_pipeline_is_saved_while_its_cache_is_on(tmp_path):
    tiny = tiny_pipeline("dit")
    plain = tiny(STEPS)
    haste.enable_cache(tiny.pipe, **SETTINGS)
    tiny(STEPS)
    tiny.pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is diffusers.DiTTransformer2DModel
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    again = tiny_pipeline("dit")
    again.pipe = loaded
    assert torch.equal(again(STEPS), plain)


def test_a_model_is_saved_while_its_cache_is_on(model, tmp_path):
    fast = enable(model)
    cached_answers(model, fast=fast)
    model.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(tiny_model(NAME).state_dict())
    # Products of weights that lie elsewhere in memory may be rounded otherwise.
    torch.testing.assert_close(cached_answers(loaded), cached_answers(model, fast=fast), rtol=1e-5, atol=1e-6)


def test_a_deepcopied_pipeline_runs_on_its_own():
    """Cached or not, but as one of the two, and the first stays cached."""
    tiny = tiny_pipeline("dit")
    plain = tiny(STEPS)
    haste.enable_cache(tiny.pipe, **SETTINGS)
    right = tiny(STEPS)
    copied = copy.copy(tiny)
    copied.pipe = copy.deepcopy(tiny.pipe)
    out = copied(STEPS)
    assert torch.equal(out, right) or torch.equal(out, plain)
    assert torch.equal(tiny(STEPS), right)
    haste.disable_cache(tiny.pipe)
    assert torch.equal(tiny(STEPS), plain)
    assert torch.equal(copied(STEPS), out)


def test_a_pickled_model_is_plain():
    tiny = tiny_pipeline("dit")
    haste.enable_cache(tiny.pipe, **SETTINGS)
    right = tiny(STEPS)
    file = io.BytesIO()
    torch.save(tiny.pipe.transformer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(copy.deepcopy(tiny.pipe.transformer)) is diffusers.DiTTransformer2DModel
    assert torch.equal(tiny(STEPS), right)


def test_a_copy_can_be_cached_too():
    tiny = tiny_pipeline("dit")
    haste.enable_cache(tiny.pipe, **SETTINGS)
    right = tiny(STEPS)
    copied = copy.copy(tiny)
    copied.pipe = copy.deepcopy(tiny.pipe)
    with haste.cached(copied.pipe, **SETTINGS) as fast:
        assert torch.equal(copied(STEPS), right)
    assert list(fast.report.full_steps) == FULL
    assert torch.equal(tiny(STEPS), right)


def test_the_weights_may_move_to_another_type_between_runs(model):
    fast = enable(model)
    cached_answers(model, fast=fast)
    model.to(torch.float64)
    call = tiny_call(NAME)
    double = {key: v.double() if isinstance(v, Tensor) else v for key, v in call.arguments.items()}
    answers = cached_answers(model, Call(double), fast)
    assert answers.dtype == torch.float64
    assert torch.equal(answers, cached_answers(tiny_model(NAME).double(), Call(double)))


def test_bfloat16(model):
    model.to(torch.bfloat16)
    call = tiny_call(NAME)
    half = {key: v.bfloat16() if isinstance(v, Tensor) else v for key, v in call.arguments.items()}
    for granularity in GRANULARITIES:
        answers = cached_answers(model, Call(half), granularity=granularity)
        assert answers.dtype == torch.bfloat16 and answers.isfinite().all()


# ---- refusals ----


def assert_refused(model: nn.Module, match: str, call: Call | None = None, times=None, **settings) -> None:
    call = call or tiny_call(NAME)
    times = times or call.times(STEPS)
    before = type(model), sorted(vars(model))
    with pytest.raises(UserError, match=match):
        with haste.cached(model, times=times[:-1], **{**SETTINGS, **settings}) as fast:
            sample(model, call, times, fast)
    assert (type(model), sorted(vars(model))) == before


def test_training_mode_is_refused(model):
    assert_refused(model.train(), "eval")


def test_a_compiled_wrapper_is_refused(model):
    assert_refused(torch.compile(model, backend="eager"), "compile")


def test_diffusers_own_cache_is_refused(model):
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert_refused(model, "disable_cache")
    model.disable_cache()
    cached_answers(model)


def test_a_second_cache_is_refused():
    tiny = tiny_pipeline("flux")
    handle = haste.enable_cache(tiny.pipe, **SETTINGS)
    for again in (tiny.pipe, tiny.pipe.transformer):
        with pytest.raises(UserError, match="disable_cache"):
            haste.enable_cache(again, **SETTINGS, **({} if again is tiny.pipe else {"num_steps": STEPS}))
    assert torch.equal(tiny(STEPS), tiny(STEPS)) and list(handle.report.full_steps) == FULL


def test_times_that_differ_within_the_batch_are_refused(model):
    call = tiny_call(NAME)
    arguments = {
        k: v.repeat(2, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v for k, v in call.arguments.items()
    }
    arguments |= {"img_ids": call.arguments["img_ids"], "txt_ids": call.arguments["txt_ids"]}
    arguments["timestep"] = torch.tensor([0.9, 0.5])
    with haste.cached(model, num_steps=STEPS, **SETTINGS) as fast:
        with pytest.raises(UserError, match="time"):
            fast(**arguments)


def test_times_off_the_plan_are_refused(model):
    call = tiny_call(NAME)
    times = call.times(STEPS)
    with haste.cached(model, times=times[:-1], **SETTINGS) as fast:
        fast(**call.at(call.latents, times[0]))
        with pytest.raises(UserError, match="time"):
            fast(**call.at(call.latents, (times[1] + times[2]) / 2))


def test_more_steps_than_planned_are_refused(model):
    call = tiny_call(NAME)
    times = call.times(STEPS + 1)
    with haste.cached(model, num_steps=STEPS, **SETTINGS) as fast:
        with pytest.raises(UserError, match="num_steps"):
            sample(model, call, times, fast)


def test_a_model_without_a_plan_is_refused(model):
    call = tiny_call(NAME)
    with haste.cached(model, **SETTINGS) as fast, pytest.raises(UserError, match="start"):
        fast(**call.arguments)


def test_the_default_refuses_few_steps(model):
    with pytest.raises(UserError, match="num_steps|steps"):
        haste.enable_cache(model, num_steps=4)


@pytest.mark.parametrize("settings", [{"interval": 0}, {"order": -1}, {"cache": "x"}, {"granularity": "layer"}])
def test_settings_out_of_bounds_are_refused_by_name(model, settings):
    with pytest.raises(UserError, match=next(iter(settings)).replace("_", "[-_]")):
        haste.enable_cache(model, num_steps=STEPS, **{**SETTINGS, **settings})


@pytest.mark.parametrize("given", [3, None, "flux", nn.Linear(2, 2).weight])
def test_what_is_neither_model_nor_pipeline_is_refused(given):
    with pytest.raises(UserError, match="model"):
        haste.enable_cache(given, num_steps=STEPS)


def test_disabling_what_has_no_cache_does_nothing(model):
    haste.disable_cache(model)
    haste.disable_cache(tiny_pipeline("flux").pipe)


# ---- guidance in a loop of one's own ----


@torch.no_grad()
def guided(fast, call: Call, separate: bool, drop_after: int = 99) -> Tensor:
    """Euler with guidance of 3 by two calls at each time, or one of two rows."""
    times = call.times(STEPS)
    x = call.latents
    null = torch.zeros_like(call.arguments["encoder_hidden_states"])
    for i, time in enumerate(times[:-1]):
        arguments = call.at(x, time)
        if i >= drop_after:
            v = fast(**arguments)[0]
        elif separate:
            with_text = fast(**arguments)[0]
            without = fast(**{**arguments, "encoder_hidden_states": null})[0]
            v = without + 3 * (with_text - without)
        else:
            both = {
                key: torch.cat([value, value]) if isinstance(value, Tensor) and not key.endswith("ids") else value
                for key, value in arguments.items()
            }
            both["encoder_hidden_states"] = torch.cat([arguments["encoder_hidden_states"], null])
            with_text, without = fast(**both)[0].chunk(2)
            v = without + 3 * (with_text - without)
        x = x + (times[i + 1] - time) * v
    return x


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_guidance_apart_is_guidance_in_one_batch(model, granularity):
    call, outs = tiny_call(NAME), []
    for separate in (True, False):
        fast = enable(model, granularity=granularity)
        outs.append(guided(fast, call, separate))
        assert list(fast.report.full_steps) == FULL
        haste.disable_cache(model)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_guidance_on_an_interval(model):
    """The branch that ends is not mixed up with the one that goes on."""
    call = tiny_call(NAME)
    fast = enable(model)
    out = guided(fast, call, separate=True, drop_after=5)
    assert list(fast.report.full_steps) == FULL
    assert torch.equal(guided(fast, call, separate=True, drop_after=5), out)
    plain = guided(model, call, separate=True, drop_after=5)
    assert (out - plain).norm() < 0.3 * plain.norm()


def test_flux_of_another_shape_is_another_model():
    """What was found out about one model does not serve another of its class."""
    deep, flat = flux_transformer(num_layers=3), flux_transformer(num_layers=1, num_single_layers=1)
    arguments = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "guidance": torch.ones(1), "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3), "return_dict": False,
    }  # fmt: skip
    call = Call(arguments)
    times = call.times(STEPS)
    with (
        haste.cached(deep, times=times[:-1], **SETTINGS) as one,
        haste.cached(flat, times=times[:-1], **SETTINGS) as two,
    ):
        for _ in range(2):
            both = [torch.stack([a[0] for a in sample(model, call, times, model)]) for model in (one, two)]
    for model, out in zip((deep, flat), both, strict=True):
        assert torch.equal(cached_answers(model, call), out)
