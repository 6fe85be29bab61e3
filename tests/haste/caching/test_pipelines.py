"""The cache in real pipelines of diffusers: which steps are full, and that no run leaves a trace in the next."""

from __future__ import annotations

import copy

import haste
import pytest
import torch
from haste.caching.clocks import is_noisy
from haste.errors import UserError
from pipelines import PIPELINES, Spy, Tiny, flux_transformer, pixart, tiny_pipeline
from zoo import last_to_run

diffusers = pytest.importorskip("diffusers")

STEPS = 12
SETTINGS = {"cache": "newton", "granularity": "model", "interval": 3, "order": 1, "first_enhance": 2}
OWN = [0, 1, 4, 7, 10]  # of 12 steps
HEUN = [0, 1, 2, 7, 8, 13, 14, 19, 20]  # the same steps, of which all but the first are two evaluations
BOTH = {False: OWN, True: HEUN}

FEW_STEPS = {"pixart, lcm"}  # a test of its own
KINDS = [name for name in PIPELINES if name not in FEW_STEPS]
CASES = [(name, heun) for name in KINDS for heun in (False, True) if not heun or tiny_pipeline(name).heun]
# For tests of many runs; pytest --zoo takes them all.
FEW_CASES = [("flux, true guidance", False), ("sd3, skip-layer guidance", True), ("dit", True), ("wan 2.2", False)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "few_or_all" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--zoo") else FEW_CASES
        metafunc.parametrize("few_or_all", cases, ids=[f"{name}{', heun' * heun}" for name, heun in cases])


def enabled(name: str, heun: bool = False, **settings) -> tuple[Tiny, object]:
    tiny = tiny_pipeline(name, heun)
    return tiny, haste.enable_cache(tiny.pipe, **{**SETTINGS, **settings})


def fresh(name: str, heun: bool = False, steps: int = STEPS, **changes) -> torch.Tensor:
    """What a new pipeline returns in its first cached run."""
    tiny, _ = enabled(name, heun)
    return tiny(steps, **changes)


PATTERNS = {
    "sd3, skip-layer guidance": {False: {"transformer": [0, 1, 2, 4, 7, 10]}},  # its first call, at step 2, is full
    "flux img2img": {False: {"transformer": [0, 1, 4, 7]}},  # 8 of the 12 steps are left, and counted from 0
    "wan 2.2": {  # the second transformer begins to count where it begins to run
        False: {"transformer": [0, 1, 4], "transformer_2": [7, 8, 11]},
        True: {"transformer": [0, 1, 2, 7, 8], "transformer_2": [13, 14, 15, 16, 21, 22]},
    },
}


@pytest.mark.parametrize(("name", "heun"), CASES)
def test_which_steps_are_full(name, heun):
    tiny = tiny_pipeline(name, heun)
    spy = Spy(tiny)
    haste.enable_cache(tiny.pipe, **SETTINGS)
    patterns = PATTERNS.get(name, {}).get(heun, {"transformer": BOTH[heun]})
    for _ in range(2):
        spy.clear()
        tiny(STEPS)
        assert {transformer: spy.full(transformer) for transformer in patterns} == patterns


def test_report_of_a_run():
    tiny, handle = enabled("sd3")
    tiny(STEPS)
    assert list(handle.report.full_steps) == OWN
    assert list(handle.report.forecast_steps) == [step for step in range(STEPS) if step not in OWN]
    assert handle.report.mib > 0 and "5" in str(handle.report)
    tiny(8)
    assert list(handle.report.full_steps) == [0, 1, 4, 7]


@pytest.mark.parametrize("granularity", ["output", "model", "block"])
def test_every_step_full_is_the_pipeline(few_or_all, granularity):
    name, heun = few_or_all
    plain = tiny_pipeline(name, heun)(STEPS)
    tiny, _ = enabled(name, heun, interval=1, granularity=granularity)
    assert torch.equal(tiny(STEPS), plain)
    haste.disable_cache(tiny.pipe)
    assert torch.equal(tiny(STEPS), plain)


@pytest.mark.parametrize("name", KINDS)
def test_after_disable_cache_the_bits_are_those_of_before(name):
    tiny = tiny_pipeline(name)
    plain, before = tiny(STEPS), {key: type(value) for key, value in tiny.pipe.components.items()}
    handle = haste.enable_cache(tiny.pipe, **SETTINGS)
    cached = tiny(STEPS)
    assert not torch.equal(cached, plain)
    haste.disable_cache(handle)
    assert {key: type(value) for key, value in tiny.pipe.components.items()} == before
    assert torch.equal(tiny(STEPS), plain)


class Raises(RuntimeError):
    pass


def break_off(tiny: Tiny, calls: int) -> None:
    """A run that ends with an exception in the transformer's last module, at its call number `calls`."""
    seen: list[int] = []

    def hook(*_):
        seen.append(0)
        if len(seen) == calls:
            raise Raises

    tail = last_to_run(tiny.pipe.transformer, lambda: tiny(STEPS))
    handle = tail.register_forward_hook(hook)
    with pytest.raises(Raises):
        tiny(STEPS)
    handle.remove()


def test_no_run_leaves_a_trace_in_the_next(few_or_all):
    name, heun = few_or_all
    tiny, _ = enabled(name, heun)
    first = tiny(STEPS)
    assert torch.equal(tiny(STEPS), first)
    changes = [{"steps": 8}, {"batch": {}}] if name == "dit" else [{"steps": 8}, tiny.larger, tiny.prompt(batch=2)]
    if name not in ("cogvideox", "dit"):  # whose text is always of one length
        changes.append(tiny.prompt(tokens=5))
    if name == "dit":
        changes[1] = {"class_labels": [3, 7]}
    for change in changes:
        assert torch.equal(tiny(**{"steps": STEPS, **change}), fresh(name, heun, **change)), change
        assert torch.equal(tiny(STEPS), first), change
    for calls in (3, 6):  # on a forecast and on a full step, or about there
        break_off(tiny, calls)
        assert torch.equal(tiny(STEPS), first)


def test_a_callback_that_raises():
    tiny, _ = enabled("flux")
    first = tiny(STEPS)

    def callback(pipe, step, time, values):
        if step == 5:
            raise Raises
        return values

    with pytest.raises(Raises):
        tiny(STEPS, callback_on_step_end=callback)
    assert torch.equal(tiny(STEPS), first)


def test_two_pipelines_of_a_class_do_not_touch_each_other():
    """One runs as a whole within a step of the other."""
    alone = fresh("sd3")
    outer, _ = enabled("sd3")
    inner, _ = enabled("sd3")
    plain = tiny_pipeline("sd3")
    inside = []

    def callback(pipe, step, time, values):
        if step == 3:
            inside.extend([inner(STEPS), plain(STEPS)])
        return values

    assert torch.equal(outer(STEPS, callback_on_step_end=callback), alone)
    assert torch.equal(inside[0], alone)
    assert torch.equal(inside[1], tiny_pipeline("sd3")(STEPS))


def test_img2img_of_another_strength():
    tiny, _ = enabled("flux img2img")
    first = tiny(STEPS)
    assert torch.equal(tiny(STEPS, strength=1.0), fresh("flux img2img", strength=1.0))
    assert torch.equal(tiny(STEPS), first)


def test_a_deepcopied_scheduler_is_plain_and_its_steps_are_not_counted():
    tiny, _ = enabled("sd3")
    first = tiny(STEPS)

    def callback(pipe, step, time, values):
        if step == 4:
            copied = copy.deepcopy(pipe.scheduler)
            assert copied is not pipe.scheduler
            copied.set_timesteps(5)
            latents = torch.zeros(1, 4, 8, 8)
            for at in copied.timesteps:
                latents = copied.step(torch.ones_like(latents), at, latents, return_dict=False)[0]
            torch.testing.assert_close(latents, -torch.ones_like(latents) * copied.sigmas[0], rtol=1e-5, atol=1e-6)
        return values

    assert torch.equal(tiny(STEPS, callback_on_step_end=callback), first)
    haste.disable_cache(tiny.pipe)
    assert type(copy.deepcopy(tiny.pipe.scheduler)) is diffusers.FlowMatchEulerDiscreteScheduler


def test_the_scheduler_may_be_replaced_while_the_cache_is_on():
    tiny, _ = enabled("sd3")
    own = tiny(STEPS)
    before = tiny.pipe.scheduler
    tiny.pipe.scheduler = tiny.heun()
    assert torch.equal(tiny(STEPS), fresh("sd3", heun=True))
    tiny.pipe.scheduler = before
    assert torch.equal(tiny(STEPS), own)
    tiny.pipe.scheduler = tiny.heun()
    plain = tiny_pipeline("sd3", heun=True)(STEPS)
    haste.disable_cache(tiny.pipe)
    assert torch.equal(tiny(STEPS), plain)
    assert type(tiny.pipe.scheduler) is diffusers.FlowMatchHeunDiscreteScheduler
    assert type(before) is diffusers.FlowMatchEulerDiscreteScheduler


def test_from_pipe_shares_what_is_cached():
    tiny, handle = enabled("flux img2img")
    image = tiny(STEPS)
    other = Tiny(diffusers.FluxPipeline.from_pipe(tiny.pipe), tiny_pipeline("flux").call)
    other.pipe.set_progress_bar_config(disable=True)
    assert other.pipe.transformer is tiny.pipe.transformer
    text = other(STEPS)
    assert list(handle.report.full_steps) == OWN
    assert torch.equal(tiny(STEPS), image)
    haste.disable_cache(tiny.pipe)
    assert not torch.equal(other(STEPS), text)


def test_few_steps_of_a_consistency_model_take_delta_dit():
    tiny = pixart(diffusers.LCMScheduler())
    tiny.pipe.set_progress_bar_config(disable=True)
    spy = Spy(tiny)
    plain = tiny(4)
    spy.clear()
    with haste.cached(tiny.pipe, cache="delta-dit", interval=2, gate=2, cached_blocks=3):
        cached = tiny(4)
    steps = [sorted({number for at, number in spy.blocks["transformer"] if at == step}) for step in range(4)]
    assert steps == [[0, 1, 2, 3], [0], [0, 1, 2, 3], [3]]
    assert torch.equal(tiny(4), plain) and not torch.equal(cached, plain)


def test_a_scheduler_that_adds_noise_takes_order_1_at_most():
    tiny = pixart(diffusers.LCMScheduler())
    tiny.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="order"):
        haste.enable_cache(tiny.pipe, cache="newton", interval=3, order=2)
        tiny(STEPS)
    haste.disable_cache(tiny.pipe)


def test_the_default_refuses_few_steps():
    tiny = tiny_pipeline("flux")
    with haste.cached(tiny.pipe):
        with pytest.raises(UserError, match="num_inference_steps|steps"):
            tiny(4)
        tiny(20)


@pytest.mark.parametrize("name", [
    "LCMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "TCDScheduler", "SASolverScheduler", "CogVideoXDPMScheduler", "SCMScheduler",
    "UnCLIPScheduler", "FlowMatchLCMScheduler",
])  # fmt: skip
def test_schedulers_that_add_noise_are_known(name):
    assert is_noisy(getattr(diffusers, name)())


@pytest.mark.parametrize("name", [
    "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "PNDMScheduler",
])  # fmt: skip
def test_solvers_of_the_ode_are_not_noisy(name):
    assert not is_noisy(getattr(diffusers, name)())


def test_settings_that_add_noise_are_known():
    assert is_noisy(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert is_noisy(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_the_default_order_falls_to_1_where_noise_is_added():
    tiny = pixart(diffusers.LCMScheduler())
    tiny.pipe.set_progress_bar_config(disable=True)
    with haste.cached(tiny.pipe) as fast:
        tiny(20)
    assert len(fast.report.full_steps) < 8


def test_settings_that_no_run_can_have_are_refused_at_once():
    tiny = tiny_pipeline("flux")
    before = type(tiny.pipe.transformer), type(tiny.pipe.scheduler)
    for settings, name in [({"interval": 0}, "interval"), ({"granularity": "tensor"}, "granularity"), ({"x": 1}, "x")]:
        with pytest.raises((UserError, TypeError), match=name):
            haste.enable_cache(tiny.pipe, **settings)
    assert (type(tiny.pipe.transformer), type(tiny.pipe.scheduler)) == before


def test_a_pipeline_with_a_scheduler_of_its_own_gets_the_models_own_answers():
    """Its calls of the shared transformer are not those of the cached pipeline's run, which is over."""
    transformer = flux_transformer()
    one, two = tiny_pipeline("flux"), tiny_pipeline("flux")
    one.pipe.transformer = two.pipe.transformer = transformer
    plain = two(STEPS)
    haste.enable_cache(one.pipe, **SETTINGS)
    cached = one(STEPS)
    assert torch.equal(two(STEPS), plain)
    assert torch.equal(one(STEPS), cached) and not torch.equal(cached, plain)


@pytest.mark.parametrize("granularity", ["model", "block", "module"])
def test_a_block_that_is_replaced_between_runs_is_the_one_that_runs(granularity):
    tiny, _ = enabled("flux", granularity=granularity)
    tiny(STEPS)
    blocks = tiny.pipe.transformer.single_transformer_blocks
    blocks[-1] = copy.deepcopy(blocks[0])
    replaced = tiny(STEPS)
    haste.disable_cache(tiny.pipe)
    haste.enable_cache(tiny.pipe, **{**SETTINGS, "granularity": granularity})
    assert torch.equal(tiny(STEPS), replaced)


def test_two_pipelines_that_share_a_transformer():
    """The second is refused, or both work: the transformer has one cache."""
    transformer = flux_transformer()
    one, two = tiny_pipeline("flux"), tiny_pipeline("flux")
    one.pipe.transformer = two.pipe.transformer = transformer
    haste.enable_cache(one.pipe, **SETTINGS)
    with pytest.raises(UserError, match="disable_cache"):
        haste.enable_cache(two.pipe, **SETTINGS)
    haste.disable_cache(one.pipe)
