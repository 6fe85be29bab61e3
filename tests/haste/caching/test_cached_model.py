"""A cache around a SiT, against the published recurrence written out plainly, in double precision."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import (
    FAST,
    CacheConfig,
    CachedModel,
    cache_bytes,
    check_memory,
    disable_cache,
    enable_cache,
    fast_config,
    make_cache,
)
from haste.errors import UserError
from haste.models import SiT
from haste.samplers import model_calls, sample


def cache(model: torch.nn.Module, forecaster: str = "taylor", **settings) -> CachedModel:
    """With TaylorSeer as published, unless other settings are given."""
    return enable_cache(model, **{"cache": forecaster, "granularity": "module", "interval": None, **settings})


def published(model: SiT, x, labels, num_steps: int, full: list[int], order: int, first_enhance=2) -> torch.Tensor:
    """Euler with TaylorSeer as its authors put it: terms kept per module, the step counted down, dictionaries."""
    cache: dict[tuple[int, str], list[torch.Tensor]] = {}
    activated: list[int] = []
    for index in range(num_steps):
        step = num_steps - 1 - index
        if index in full:
            activated.append(step)
        t = torch.full((len(x),), 1 - index / num_steps, dtype=x.dtype)

        def branch(key, compute, is_full=index in full, step=step, index=index):
            if not is_full:
                x = step - activated[-1]
                return sum(term * x**i / math.factorial(i) for i, term in enumerate(cache[key]))
            new, old = [compute()], cache.get(key, [])
            for i in range(order):
                if i < len(old) and index > first_enhance - 2:
                    new.append((new[i] - old[i]) / (activated[-1] - activated[-2]))
            cache[key] = new
            return new[0]

        tokens, c = model.embed(x, t, labels)
        for number, block in enumerate(model.blocks):
            shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in block.adaLN_modulation(c).chunk(6, dim=1))
            h = tokens
            tokens = h + gate * branch(
                (number, "attn"), lambda b=block, h=h, s=scale, o=shift: b.attn(b.norm1(h) * (1 + s) + o)[0]
            )
            h = tokens
            tokens = h + gate2 * branch(
                (number, "mlp"), lambda b=block, h=h, s=scale2, o=shift2: b.mlp(b.norm2(h) * (1 + s) + o)
            )
        x = x - model.finish(tokens, c) / num_steps
    return x


@pytest.mark.parametrize(
    "interval, order, first_enhance",
    [(2, 0, 2), (3, 1, 2), (4, 2, 2), (3, 3, 2), (4, 4, 2), (6, 1, 3), (4, 2, 3), (3, 4, 4), (5, 1, 1)],
)
@torch.no_grad()
def test_it_is_the_published_recurrence(interval, order, first_enhance):
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    full = [*range(first_enhance - 1), *range(first_enhance - 1, 20, interval)]
    expected = published(model, noise, labels, 20, full, order, first_enhance)
    seer = cache(model, interval=interval, order=order, first_enhance=first_enhance)
    got = sample(seer, noise, labels, num_steps=20)
    # The weights reach the kernel in float32.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert (seer.num_full, seer.num_forecast) == (len(full), 20 - len(full))
    uncached = sample(model, noise, labels, num_steps=20)
    assert (expected - uncached).abs().max() > 1e-4  # the comparison above is not one of two full runs


@pytest.mark.parametrize("granularity, tolerance", [("module", 1e-5), ("block", 0), ("model", 0)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_interval_one_is_the_model(sampler, granularity, tolerance):
    """Bit for bit, but per module, where a gate is applied with one rounding less."""
    model = small_sit()
    noise, labels = small_noise()
    images = [
        sample(m, noise, labels, num_steps=6, sampler=sampler, cfg_scale=2.0, guidance_low=0.5, null=10,
               generator=torch.Generator().manual_seed(2))
        for m in (model, cache(model, interval=1, order=2, granularity=granularity))
    ]  # fmt: skip
    torch.testing.assert_close(images[0], images[1], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_forecast_step_runs_no_attention_and_no_mlp():
    model = small_sit()
    ran = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append("attn"))
        block.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
        block.adaLN_modulation.register_forward_hook(lambda *_: ran.append("modulation"))
    noise, labels = small_noise()
    seer = cache(model, interval=2, order=1, first_enhance=1, num_steps=3)
    for step, expected in enumerate((["modulation", "attn", "mlp"] * 2, [])):
        ran.clear()
        seer(noise, torch.full((2,), 1 - step / 3), labels)
        assert ran == expected


@torch.no_grad()
def test_a_forecast_of_constant_features_follows_the_gate_of_its_own_time():
    """With order 0 a forecast step adds gate(t) times the old branches; t, and so the gates, are the new ones."""
    model = small_sit(depth=1)
    noise, labels = small_noise()
    seer = cache(model, interval=3, order=0, first_enhance=1, num_steps=3)
    seer(noise, torch.ones(2), labels)
    tokens, c = model.embed(noise, torch.ones(2), labels)
    block = model.blocks[0]
    m = block.modulation(c)
    attn = block.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
    mlp = block.mlp_branch(tokens + m.gate_attn[:, None] * attn, m.shift_mlp, m.scale_mlp)

    x, t = noise * 0.9, torch.full((2,), 0.5)
    tokens, c = model.embed(x, t, labels)
    m = block.modulation(c)
    expected = model.finish(tokens + m.gate_attn[:, None] * attn + m.gate_mlp[:, None] * mlp, c)
    torch.testing.assert_close(seer(x, t, labels).prediction, expected, rtol=1e-5, atol=1e-5)


def watched(cached: CachedModel) -> list[tuple[int, bool]]:
    """A list that gets, per call, the batch and whether the call was full."""
    seen: list[tuple[int, bool]] = []
    forward = cached.forward

    def watching(x, t, y):
        before = cached.num_full
        output = forward(x, t, y)
        seen.append((len(x), cached.num_full > before))
        return output

    cached.forward = watching
    return seen


def test_where_guidance_ends_the_labelled_half_keeps_its_history():
    """Guided from t = 1 down to 0.5; the eleven steps begin at t = 1, 10/11, ..., so steps 0 to 5 are guided."""
    noise, labels = small_noise()
    cached = cache(small_sit(), interval=4, order=1)
    seen = watched(cached)
    sample(cached, noise, labels, num_steps=11, cfg_scale=2.0, guidance_low=0.5, null=10)
    assert seen == list(zip([4] * 6 + [2] * 5, [step in (0, 1, 5, 9) for step in range(11)], strict=True))


@pytest.mark.parametrize("guidance, calls", [("batched", [(4, 1)]), ("separate", [(2, 1), (2, 1)])])
def test_where_guidance_begins_the_null_half_needs_a_full_step(guidance, calls):
    """Guided below t = 0.5 alone: step 6 is the first one; the interval is counted from it."""
    noise, labels = small_noise()
    cached = cache(small_sit(), interval=4, order=1)
    seen = watched(cached)
    sample(cached, noise, labels, num_steps=11, cfg_scale=2.0, guidance_high=0.5, null=10, guidance=guidance)
    assert cached.full_steps == [0, 1, 5, 6, 10]
    expected = [[(2, step in cached.full_steps)] for step in range(6)]
    expected += [[(rows, step in cached.full_steps) for rows, _ in calls] for step in range(6, 11)]
    assert seen == [call for step in expected for call in step]


@pytest.mark.parametrize("granularity", ["module", "block", "model", "output"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_batched_and_separate_guidance_draw_the_same(sampler, granularity):
    """Also where guidance begins late, so that the halves have different histories, and ends early."""
    model, images = small_sit().double(), []
    noise, labels = small_noise(dtype=torch.float64)
    for guidance in ("batched", "separate"):
        cached = cache(model, interval=3, order=2, granularity=granularity)
        images.append(
            sample(cached, noise, labels, num_steps=14, sampler=sampler, cfg_scale=2.0, guidance_low=0.2,
                   guidance_high=0.7, null=10, guidance=guidance, generator=torch.Generator().manual_seed(2))
        )  # fmt: skip
    torch.testing.assert_close(images[0], images[1], rtol=1e-9, atol=1e-9)


def test_a_history_of_its_own_is_what_each_half_is_forecast_from():
    """Each half of a guided run is what a run of that half alone would give, where both begin together."""
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    times = [1 - step / 8 for step in range(8)]
    guided = cache(model, interval=3, order=1, num_steps=8)
    alone = [cache(model, interval=3, order=1, num_steps=8) for _ in range(2)]
    null = torch.full_like(labels, 10)
    for t in times:
        t = torch.full((2,), t, dtype=torch.float64)
        both = guided(noise.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, null])).prediction
        parts = torch.cat([part(noise, t, y).prediction for part, y in zip(alone, (labels, null), strict=True)])
        torch.testing.assert_close(both, parts, rtol=1e-9, atol=1e-9)


def test_heun_runs_both_evaluations_of_a_step_alike():
    noise, labels = small_noise()
    cached = cache(small_sit(), interval=3, order=1)
    seen = watched(cached)
    sample(cached, noise, labels, num_steps=6, sampler="heun")
    by_step = [[True, True], [True, True], [False, False], [False, False], [True, True], [False]]
    assert [full for _, full in seen] == [full for step in by_step for full in step]
    assert cached.full_steps == [0, 1, 4]


def test_heun_with_a_short_interval_stays_close_to_the_full_run():
    """A forecast call at a position that has just been seen in full is that cached feature: no step is lost in x."""
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    full = sample(model, noise, labels, num_steps=40, sampler="heun")
    errors = []
    for order in (0, 1):
        cached = sample(cache(model, interval=2, order=order), noise, labels, num_steps=40, sampler="heun")
        errors.append(((cached - full).norm() / (full - noise).norm()).item())
    assert errors[1] < errors[0] / 2 and errors[1] < 0.01


def test_every_run_begins_anew():
    model = small_sit()
    noise, labels = small_noise()
    seer = cache(model, interval=3, order=2)
    first = sample(seer, noise, labels, num_steps=10)
    sample(seer, -noise[:1], labels[:1], num_steps=12)  # another batch, another length, left behind
    assert torch.equal(sample(seer, noise, labels, num_steps=10), first)


def test_the_wrapped_model_is_left_as_it_was():
    model = small_sit()
    noise, labels = small_noise()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = sample(model, noise, labels, num_steps=5)
    attributes = set(vars(model)), [set(vars(block)) for block in model.blocks]
    sample(cache(model, interval=2, order=1), noise, labels, num_steps=5)
    assert (set(vars(model)), [set(vars(block)) for block in model.blocks]) == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(sample(model, noise, labels, num_steps=5), images)


def test_under_autocast_the_outputs_of_modules_are_kept_in_bf16():
    model = small_sit()
    noise, labels = small_noise()
    for granularity, dtype in (("module", torch.bfloat16), ("model", torch.float32)):
        exact = sample(cache(model, interval=3, order=1, granularity=granularity), noise, labels, num_steps=10)
        with torch.autocast("cpu", torch.bfloat16):
            cached = cache(model, interval=3, order=1, granularity=granularity)
            images = sample(cached, noise, labels, num_steps=10)
        assert cached._features.storage.dtype == dtype
        assert (images - exact).norm() < 0.05 * (exact - noise).norm()


def test_another_batch_in_the_middle_of_a_run_begins_a_history_of_its_own():
    """As when a loop of one's own lets guidance end and halves its batch."""
    model = small_sit()
    noise, labels = small_noise(4)
    cached = cache(model, interval=4, order=1, num_steps=8)
    for step in range(8):
        rows = 4 if step < 3 else 2
        out = cached(noise[:rows], torch.full((rows,), 1 - step / 8), labels[:rows])
        assert out.prediction.shape[0] == rows
    assert cached.full_steps == [0, 1, 3, 7]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_an_error_bound_decides_where_the_full_steps_are(sampler):
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    full = sample(model, noise, labels, num_steps=40, sampler=sampler)
    counts, errors = [], []
    for bound in (1e-2, 1e-3, 1e-4):
        cached = cache(model, "newton", order=2, error_threshold=bound)
        errors.append((sample(cached, noise, labels, num_steps=40, sampler=sampler) - full).norm().item())
        counts.append(cached.num_full)
    assert counts[0] < counts[1] < counts[2] <= 2 * 40 and errors[0] > errors[1] > errors[2]


def test_of_heuns_two_evaluations_the_second_is_measured():
    """Of two full steps after each other the first evaluation of the later one is known but for the corrector's change,
    which is far smaller than the error of a forecast."""
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    bounds = {0.1: [0, 1, 9], 0.03: [0, 1, 5, 8], 0.003: list(range(12))}
    for bound, full_steps in bounds.items():
        cached = cache(model, "newton", order=1, error_threshold=bound)
        sample(cached, noise, labels, num_steps=12, sampler="heun")
        assert cached.full_steps == full_steps


def test_the_measured_error_is_that_of_the_forecast_that_was_not_used():
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    reports = []
    cached = cache(model, "taylor", order=1, error_threshold=0.1)
    cached.start(3)
    cached._schedule.report = lambda *report: reports.append(report)
    times = [torch.full((2,), t, dtype=torch.float64) for t in (1.0, 0.8, 0.6)]
    first, second, third = (cached(noise * t[0], t, labels).prediction for t in times)
    probe = cache(model, "taylor", order=1, interval=2, num_steps=3)
    forecast = [probe(noise * t[0], t, labels).prediction for t in times][2]
    assert cached.full_steps == [0, 1, 2]
    assert [report[1:] for report in reports] == [(1, 1), (1, 2)]
    assert reports[1][0] == pytest.approx(((forecast - third).norm() / third.norm()).item(), rel=1e-9)


def test_calls_outside_a_run():
    noise, labels = small_noise()
    cached = cache(small_sit(), interval=2, order=1)
    with pytest.raises(UserError, match="no run has begun; call start"):
        cached(noise, torch.ones(2), labels)
    cached.start(3)
    for step in range(3):
        cached(noise, torch.full((2,), 1 - step / 3), labels)
    with pytest.raises(UserError, match="this run had 3 calls of the model and is over"):
        cached(noise, torch.zeros(2), labels)


@pytest.mark.parametrize(
    "granularity, backend", [("module", "aot_eager"), ("block", "eager"), ("model", "eager"), ("output", "eager")]
)
def test_compiled_without_a_graph_break_it_draws_the_same(granularity, backend):
    """Traced for autograd's graph where the operations are called most; Dynamo alone finds the breaks of the others."""
    model = small_sit(depth=1)
    noise, labels = small_noise()
    settings = {"cfg_scale": 2.0, "guidance_low": 0.5, "null": 10, "num_steps": 10}
    eager = sample(cache(model, interval=3, order=1, granularity=granularity), noise, labels, **settings)
    torch._dynamo.reset()
    compiled = cache(model, interval=3, order=1, granularity=granularity).compile(backend=backend)
    torch.testing.assert_close(sample(compiled, noise, labels, **settings), eager, rtol=1e-4, atol=1e-5)


MANY_GAPS = {"full_steps": "0,2,5,9,14,20,27,35,44,46", "order": 1}  # 1 to 8 forecast steps in a row


@pytest.mark.parametrize(
    "settings, lengths, batches",
    [({"interval": 4, "order": 1}, range(6, 10), (1, 2, 3)), (MANY_GAPS, [48], (2,))],
)
def test_compiled_any_number_of_forecast_steps_in_a_row_is_served(settings, lengths, batches):
    torch._dynamo.reset()
    model = small_sit(depth=1)
    compiled = cache(model, **settings).compile(backend="eager")
    guided = {"cfg_scale": 2.0, "guidance_low": 0.5, "null": 10} if len(batches) == 1 else {}
    for num_steps in lengths:
        for batch in batches:
            noise, labels = small_noise(batch)
            images = sample(compiled, noise, labels, num_steps=num_steps, **guided)
            eager = sample(cache(model, **settings), noise, labels, num_steps=num_steps, **guided)
            torch.testing.assert_close(images, eager, rtol=1e-4, atol=1e-5)


@torch._dynamo.config.patch(recompile_limit=2)
def test_compiled_any_number_of_batch_sizes_and_models_is_served():
    """torch.compile gives up after some compilations of a function, which all cached models share."""
    torch._dynamo.reset()
    for depth in range(1, 4):
        compiled, eager = (cache(small_sit(depth), order=1, granularity="model") for _ in range(2))
        compiled.compile(backend="eager")
        for batch in range(1, 11) if depth == 1 else (2, 3):
            noise, labels = small_noise(batch)
            images = sample(compiled, noise, labels, num_steps=4)
            torch.testing.assert_close(images, sample(eager, noise, labels, num_steps=4), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_compiled_as_a_whole_is_cached_by_its_output_or_refused():
    torch._dynamo.reset()
    model = small_sit(depth=1)
    noise, labels = small_noise()
    eager = sample(cache(model, interval=3, order=1, granularity="output"), noise, labels, num_steps=8)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile(backend=counter)
    images = sample(cache(model, interval=3, order=1, granularity="output"), noise, labels, num_steps=8)
    torch.testing.assert_close(images, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count >= 1
    for settings in ({"granularity": "model"}, {"granularity": "module"}, {"forecaster": "delta-dit"}):
        with pytest.raises(UserError, match="model must not be compiled before enable_cache, got a compiled SiT"):
            cache(model, **settings)


# ---- the report ----


def test_a_report_tells_full_from_forecast_steps_and_what_is_held():
    model = small_sit()
    noise, labels = small_noise()
    cached = cache(model, "newton", interval=3, order=1, granularity="model")
    assert str(cached.report) == "no step has been cached yet"
    sample(cached, noise, labels, num_steps=8, sampler="heun", cfg_scale=2.0, null=10)
    report = cached.report
    assert report.full_steps == [0, 1, 4, 7] and report.forecast_steps == [2, 3, 5, 6]
    assert (report.full_calls, report.forecast_calls) == (2 * 4 - 1, 2 * 4)
    assert report.seconds_full > 0 and report.seconds_forecast > 0
    assert report.mib == cached.cache_bytes / 2**20 > 0
    assert report.cached in str(report) and "4 of 8 steps in full: 0,1,4,7" in str(report)
    assert copy.deepcopy(cached).report == report
    disable_cache(cached)
    assert cached.report.mib == 0


@pytest.mark.parametrize(
    "settings, cached",
    [
        ({"granularity": "module"}, "the outputs of 4 attentions and MLPs"),
        ({"granularity": "block"}, "what 2 of 2 blocks add to the tokens"),
        ({"granularity": "model"}, "the tokens after the last block"),
        ({"granularity": "output"}, "the model's output"),
        ({"cache": "delta-dit", "cached_blocks": 1}, "what 1 of 2 blocks add to the tokens"),
    ],
)
def test_a_report_names_what_is_cached(settings, cached):
    model = small_sit()
    noise, labels = small_noise(1)
    fast = enable_cache(model, **{"cache": "taylor", "interval": 2, **settings})
    sample(fast, noise, labels, num_steps=4)
    assert fast.report.cached == cached


def test_what_the_model_has_the_cache_has():
    model = small_sit()
    cached = cache(model, interval=2, order=1)
    assert cached.num_classes == 10 and cached.null_label == 10 and cached.dtype == torch.float32
    assert not cached.training and {id(p) for p in cached.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cached.nonsense


def run_by_hand(cached: CachedModel, num_steps: int = 8) -> torch.Tensor:
    """An Euler loop as a user has it."""
    x, labels = small_noise()
    for step in range(num_steps):
        x = x - cached(x, torch.full((len(x),), 1 - step / num_steps), labels)[0] / num_steps
    return x


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
def test_a_run_in_inference_mode_may_be_followed_by_one_outside_of_it(granularity):
    cached = cache(small_sit(), order=1, granularity=granularity, num_steps=8)
    with torch.inference_mode():
        first = run_by_hand(cached)
    cached.start(8)
    assert torch.equal(run_by_hand(cached), first)


def test_a_copy_runs_the_copied_model():
    cached = cache(small_sit(), order=1, num_steps=8)
    other = copy.deepcopy(cached)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    assert torch.equal(run_by_hand(other), small_noise()[0])  # which draws nothing
    assert not torch.equal(run_by_hand(cached), small_noise()[0])


def test_a_model_in_training_mode_is_refused_and_its_parts_keep_their_modes():
    model = small_sit().train()
    model.blocks[0].eval()
    cached = cache(model, num_steps=20)
    assert not model.blocks[0].training
    with pytest.raises(ValueError, match="model must be in eval mode"):
        run_by_hand(cached)
    run_by_hand(cached.eval())


def test_the_number_of_steps_may_be_numpys():
    cached = cache(small_sit(), order=1, num_steps=np.int64(8))
    run_by_hand(cached)
    assert cached.full_steps == [0, 1, 5]


def test_an_adaptive_schedule_computes_a_model_that_gives_nan_in_full():
    model = small_sit()
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    cached = cache(model, order=1, error_threshold=0.1, num_steps=8)
    assert run_by_hand(cached).isnan().all() and cached.full_steps == list(range(8))


# ---- enable_cache, disable_cache, and the memory that a cache takes ----


def test_three_lines_around_a_loop_of_ones_own():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, num_steps=10)
    for step in range(10):
        x = x - fast(x, torch.full((2,), 1 - step / 10), y).prediction / 10
    assert disable_cache(fast) is model and fast.cache_bytes == 0
    assert disable_cache(model) is model
    noise, labels = small_noise()
    planned = make_cache(model, fast_config(10, noisy=False))
    torch.testing.assert_close(x, sample(planned, noise, labels, num_steps=10), rtol=1e-4, atol=1e-5)


def test_a_loop_that_calls_more_than_once_a_step_hands_over_its_plan():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, model_calls=model_calls("heun", 4), cache="newton", order=1, interval=2)
    for time in (1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25):  # Heun's second look at a time is the next step's first
        fast(x, torch.full((2,), time), y)
    assert fast.full_steps == [0, 1, 3] and fast.num_full == 5


def test_what_enable_cache_takes():
    model, config = small_sit(), CacheConfig(cache="hermite", order=1)
    given = [
        (enable_cache(model), FAST),
        (enable_cache(model, interval=4), replace(FAST, interval=4)),
        (enable_cache(model, cache="newton", order=3), CacheConfig(cache="newton", order=3)),
        (enable_cache(model, config), config),
        (enable_cache(model, config, interval=5), CacheConfig(cache="hermite", order=1, interval=5)),
    ]
    for cached, expected in given:
        assert cached.config == expected
    with pytest.raises(UserError, match="cache must be"):
        enable_cache(model, CacheConfig())
    with pytest.raises(UserError, match="the model has a cache already; disable_cache it"):
        enable_cache(enable_cache(model))
    with pytest.raises(UserError, match="a run must have one of num_steps, times and model_calls, got several"):
        enable_cache(model, num_steps=3, times=[3, 2, 1])


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_estimate_is_what_a_run_takes(granularity, cfg_scale):
    model = small_sit()
    noise, labels = small_noise(3)
    settings = CacheConfig(cache="taylor", granularity=granularity, interval=3, order=2)
    cached = make_cache(model, settings)
    sample(cached, noise, labels, num_steps=10, cfg_scale=cfg_scale, null=10)
    assert cached.cache_bytes == cache_bytes(model, settings, 3 if cfg_scale == 1 else 6)
    cached.release()
    assert cached.cache_bytes == 0


def test_delta_dit_keeps_one_tensor_and_no_cache_nothing():
    model = small_sit()
    one = 16 * 32 * 4
    assert cache_bytes(model, CacheConfig(cache="delta-dit"), 5) == 5 * one
    assert cache_bytes(model, CacheConfig(), 5) == 0
    assert cache_bytes(model, CacheConfig(cache="delta-dit"), 1, torch.bfloat16) == one // 2


def test_the_output_that_will_be_cached_is_counted_by_its_shape_before_the_first_call():
    model, settings = small_sit(), CacheConfig(cache="taylor", granularity="output", order=1)
    shape = (1, 8, 8)
    cached = make_cache(model, settings)
    noise, labels = small_noise(3)
    sample(cached, noise, labels, num_steps=8)
    assert cache_bytes(model, settings, 3, input_shape=shape) == cached.cache_bytes == 2 * 3 * 8 * 8 * 4
    with pytest.raises(UserError, match="per output takes .* not even one image fits"):
        check_memory(model, settings, 1, free=100, input_shape=shape)
    with pytest.raises(ValueError, match="input_shape must be"):
        cache_bytes(model, settings, 3)


def test_too_little_memory_names_what_would_fit():
    model, settings = small_sit(), CacheConfig(cache="taylor", order=1, interval=1)  # nothing is made ahead of time
    gib = 2**20  # images at once, so that sizes are in GiB: per module 4 · 2 · 2 KiB each
    check_memory(model, settings, gib, free=16 * 2**30)
    with pytest.raises(UserError, match="per module takes 16.0 GiB for 1048576 images at once, and 9.0 GiB are free; "
                       "--granularity model takes 4.0 GiB"):  # fmt: skip
        check_memory(model, settings, gib, free=9 * 2**30)
    with pytest.raises(UserError, match="2.0 GiB are free; 131072 images at once .--per-proc-batch-size. would fit"):
        check_memory(model, settings, gib, free=2 * 2**30)
    with pytest.raises(UserError, match="0.0 GiB are free; not even one image fits"):
        check_memory(model, settings, gib, free=100)
    with pytest.raises(UserError, match="the cache takes 2.0 GiB for 1048576 images at once, .* 524288 images"):
        check_memory(model, CacheConfig(cache="delta-dit"), gib, free=2**30)
    with pytest.raises(UserError, match="per model takes 8.0 GiB for 1048576 images at once, .* 524288 images"):
        settings = CacheConfig(cache="taylor", order=1, granularity="model")
        check_memory(model, settings, gib, guided=True, free=4 * 2**30)


def test_what_is_free_is_asked_of_the_machine():
    check_memory(small_sit(), CacheConfig(cache="taylor"), 2)
    with pytest.raises(UserError, match="GiB are free"):
        check_memory(small_sit(), CacheConfig(cache="taylor"), 2**50)


@pytest.mark.parametrize(
    "arguments, settings, named",
    [
        ((50,), {}, "config must be a CacheConfig, got 50"),
        (("taylor",), {}, "config must be a CacheConfig, got 'taylor'"),
        (({"interval": 4},), {}, "config must be a CacheConfig, got {'interval': 4}"),
        ((), {"model_calls": [1, 2, 3, 4]}, r"model_calls must be .*, got \[1, 2, 3, 4\]"),
        ((), {"cache": "none"}, "cache must be reuse, taylor, newton, hermite or delta-dit, got none"),
    ],
)
def test_likely_mistakes_of_enable_cache_are_refused_by_name(arguments, settings, named):
    with pytest.raises(UserError, match=f"^{named}"):
        enable_cache(small_sit(), *arguments, **settings)


def test_the_class_of_a_model_is_no_model():
    with pytest.raises(UserError, match="^model must be a torch.nn.Module or a pipeline of diffusers, got <class"):
        enable_cache(SiT)


def test_defaults_that_nobody_chose_fit_a_short_run():
    x, _ = small_noise()
    for num_steps, full in {1: [0], 2: [0, 1], 5: [0, 2, 3]}.items():
        cached = enable_cache(small_sit(), num_steps=num_steps)
        for step in range(num_steps):
            cached(x, torch.full((2,), 1 - step / num_steps), torch.zeros(2, dtype=torch.int64))
        assert cached.full_steps == full
    assert enable_cache(small_sit(), full_steps="0,1", num_steps=5).config.interval is None
    for chosen in ({"interval": 6}, {"order": 3}):
        with pytest.raises(UserError, match=f"--{next(iter(chosen))} must be at most"):
            enable_cache(small_sit(), num_steps=5, **chosen)


def test_a_time_may_be_a_number():
    x, labels = small_noise()
    cached = enable_cache(small_sit(), num_steps=8)
    by_number = cached(x, 1.0, labels)
    cached.start(8)
    assert torch.equal(by_number[0], cached(x, torch.ones(2), labels)[0])
