"""The corrections of several forecast calls made in one pass: the same images as one by one, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import CachedModel, enable_cache
from haste.caching.cached_model import MOST_AHEAD
from haste.caching.forecaster import Corrections, Timestep
from haste.errors import UserError
from haste.samplers import ModelCall, model_calls, sample

import haste_ext


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Steps and rows of every pass over the cached features."""
    made = []
    original = haste_ext.taylor_extrapolate_steps

    def counting(features, weights, gates=None):
        made.append((len(weights), features.shape[2]))
        return original(features, weights, gates)

    monkeypatch.setattr(haste_ext, "taylor_extrapolate_steps", counting)
    return made


def cache(**settings) -> CachedModel:
    settings = {"cache": "taylor", "interval": 4, "order": 2, **settings}
    return enable_cache(small_sit().double(), granularity="module", **settings)


def one_by_one(cached: CachedModel) -> CachedModel:
    """Every forecast call makes its own correction."""
    cached._coming_timesteps = lambda call: [Timestep(call.position, call.time)]
    return cached


GUIDED = {"cfg_scale": 2.0, "null": 10}
LATE = {**GUIDED, "guidance_high": 0.7, "guidance_low": 0.2}


@pytest.mark.parametrize("guidance", [{}, GUIDED, LATE, {**GUIDED, "guidance": "separate"},
                                      {**LATE, "guidance": "separate"}])  # fmt: skip
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("settings", [{}, {"cache": "newton"}, {"interval": 10, "error_threshold": 2.0}])
def test_images_are_those_of_corrections_made_one_by_one(sampler, guidance, settings, passes):
    noise, labels = small_noise(dtype=torch.float64)
    images = [
        sample(cached, noise, labels, num_steps=14, sampler=sampler, generator=torch.Generator().manual_seed(2),
               **guidance)
        for cached in (cache(**settings), one_by_one(cache(**settings)))
    ]  # fmt: skip
    assert any(steps > 1 for steps, _ in passes)
    torch.testing.assert_close(images[0], images[1], rtol=1e-9, atol=1e-9)


def test_one_pass_per_full_step(passes):
    """Full at 0, 1, 5, 9 of 12 steps: three skipped after 1 and after 5, two after 9."""
    noise, labels = small_noise(dtype=torch.float64)
    cached = cache()
    sample(cached, noise, labels, num_steps=12)
    assert cached.full_steps == [0, 1, 5, 9] and passes == [(3, 2), (3, 2), (2, 2)]


def test_heun_looks_at_each_timestep_once(passes):
    """After the full step 1, steps 2 to 4 look at positions 2, 3 / 3, 4 / 4, 5."""
    noise, labels = small_noise(dtype=torch.float64)
    sample(cache(), noise, labels, num_steps=6, sampler="heun")
    assert passes == [(4, 2)]


def test_separate_guidance_makes_those_of_each_half(passes):
    noise, labels = small_noise(dtype=torch.float64)
    sample(cache(), noise, labels, num_steps=6, guidance="separate", **GUIDED)
    assert passes == [(3, 2), (3, 2)]


def test_a_long_gap_takes_several_passes(passes):
    noise, labels = small_noise(dtype=torch.float64)
    sample(cache(full_steps="0,1", interval=None, order=1), noise, labels, num_steps=21)
    assert passes == [(MOST_AHEAD, 2), (MOST_AHEAD, 2), (3, 2)]


def run_at(cached: CachedModel, times: list[float]) -> list[torch.Tensor]:
    noise, labels = small_noise(dtype=torch.float64)
    return [cached(noise * t, torch.full((2,), t, dtype=torch.float64), labels).prediction for t in times]


OWN_TIMES = [1.0, 0.9, 0.7, 0.4, 0.2, 0.1]


@pytest.mark.parametrize("forecaster", ["taylor", "newton"])
def test_in_a_loop_of_ones_own_each_call_has_its_own_time(forecaster, passes):
    """A number of steps does not say at which times the loop calls: it is as if they had been given."""
    plans = [6, OWN_TIMES, [ModelCall(step, step, time) for step, time in enumerate(OWN_TIMES)]]
    answers = []
    for plan in plans:
        cached = cache(cache=forecaster)
        cached.start(plan)
        answers.append(run_at(cached, OWN_TIMES))
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=0)
    assert passes == [(1, 2)] * 9  # none is made ahead


@torch.no_grad()
def test_a_list_of_calls_does_not_fix_the_labels_that_the_loop_calls_with():
    noise, labels = small_noise(dtype=torch.float64)
    by_number, by_list, unchanged = cache(num_steps=6), cache(model_calls=model_calls("euler", 6)), cache(num_steps=6)
    for step in range(6):
        t = torch.full((2,), 1 - step / 6, dtype=torch.float64)
        y = labels + 5 if step > 2 else labels
        expected = by_number(noise, t, y).prediction
        assert torch.equal(by_list(noise, t, y).prediction, expected)
        assert torch.equal(expected, unchanged(noise, t, labels).prediction) == (step <= 2)


class Between:
    """What stands between the sampler and the cached model, and calls it with other arguments."""

    def __init__(self, model: CachedModel, change) -> None:
        self.model, self.change, self.start, self.dtype = model, change, model.start, model.dtype
        self.calls = 0

    def __call__(self, x, t, y):
        self.calls += 1
        return self.model(x, *self.change(t, y, self.calls))


OTHER_LABELS = {
    "other labels": lambda t, y, call: (t, (y + call) % 10),
    "labels written to": lambda t, y, call: (t, y.add_(1)),
    "labels copied": lambda t, y, call: (t, y.clone()),
}
OTHER_TIMES = {
    "other times": lambda t, y, call: (t - 0.01 * call, y),
    "times written to": lambda t, y, call: (t.sub_(0.01 * call), y),
    "other times from the second forecast step on": lambda t, y, call: (t - 0.01 if call > 3 else t, y),
    "another unit": lambda t, y, call: (1000 * t, y),
}


@pytest.mark.parametrize("change", OTHER_LABELS.values(), ids=OTHER_LABELS)
def test_what_was_made_for_other_labels_is_not_used(change):
    noise, labels = small_noise(dtype=torch.float64)
    images = [
        sample(Between(cached, change), noise, labels.clone(), num_steps=6) for cached in (cache(), one_by_one(cache()))
    ]
    torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", OTHER_TIMES.values(), ids=OTHER_TIMES)
def test_times_that_are_not_the_plans_are_refused(change):
    noise, labels = small_noise(dtype=torch.float64)
    with pytest.raises(UserError, match="call [14] of this run has t = .*, and the plan has .* there; pass the times"):
        sample(Between(cache(), change), noise, labels, num_steps=6)


def test_in_inference_mode_a_run_looks_ahead_too(passes):
    noise, labels = small_noise(dtype=torch.float64)
    expected = sample(cache(), noise, labels, num_steps=6, **GUIDED)
    with torch.inference_mode():
        assert torch.equal(sample(cache(), noise, labels, num_steps=6, **GUIDED), expected)
    assert passes == [(3, 4)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_rounding_of_a_time_is_known(dtype, passes):
    noise, labels = small_noise()
    cached = enable_cache(small_sit().to(dtype), cache="taylor", interval=4, order=2, granularity="module")
    sample(cached, noise, labels, num_steps=10, sampler="euler-maruyama")
    assert passes == [(3, 2), (3, 2)]


def test_what_is_held_is_counted_and_forgotten():
    held = Corrections()
    timesteps = [Timestep(1, 0.5), Timestep(2, 0.25)]
    y = torch.arange(3)
    made = (torch.zeros(3, 4, 8), torch.zeros(3, 8))
    held.keep(("cond",), y, dict.fromkeys(timesteps, made))
    assert held.most_bytes == 2 * 3 * 5 * 8 * 4
    assert held.get(("cond",), y, timesteps[1])[0].shape == (3, 4, 8)
    assert held.get(("uncond",), y, timesteps[1]) is None
    assert held.get(("cond",), y.clone(), timesteps[1]) is None
    held.clear()
    assert held.get(("cond",), y, timesteps[1]) is None and held.most_bytes > 0
    held.start()
    assert held.most_bytes == 0


def test_a_run_that_begins_anew_uses_nothing_of_the_one_before():
    noise, labels = small_noise(dtype=torch.float64)
    cached = cache()
    cached.start(model_calls("euler", 12))
    with torch.no_grad():
        for step in range(3):
            cached(noise, torch.full((2,), 1 - step / 12, dtype=torch.float64), labels)
    again = sample(cached, noise * 0.5, labels, num_steps=12)
    assert torch.equal(again, sample(cache(), noise * 0.5, labels, num_steps=12))
