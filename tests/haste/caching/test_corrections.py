"""The corrections of several skipped evaluations made in one pass: the same images as one by one, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import CachedModel, wrap
from haste.caching.corrections import MOST_AHEAD, Corrections
from haste.caching.snapshots import Place
from haste.sampling import Evaluation, evaluations, sample

import haste_ext


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Steps and rows of every pass over the snapshots."""
    made = []
    original = haste_ext.taylor_extrapolate_steps

    def counting(snapshots, weights, gates=None):
        made.append((len(weights), snapshots.shape[2]))
        return original(snapshots, weights, gates)

    monkeypatch.setattr(haste_ext, "taylor_extrapolate_steps", counting)
    return made


def cache(**settings) -> CachedModel:
    settings = {"cache": "taylor", "interval": 4, "order": 2, **settings}
    return wrap(small_sit().double(), granularity="module", **settings)


def one_by_one(cached: CachedModel) -> CachedModel:
    """Every skipped evaluation makes its own correction."""
    cached._coming_places = lambda evaluation: [Place(evaluation.position, evaluation.time)]
    return cached


GUIDED = {"cfg_scale": 2.0, "null_label": 10}
LATE = {**GUIDED, "guidance_high": 0.7, "guidance_low": 0.2}


@pytest.mark.parametrize("guidance", [{}, GUIDED, LATE, {**GUIDED, "guidance": "separate"},
                                      {**LATE, "guidance": "separate"}])  # fmt: skip
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("settings", [{}, {"cache": "newton"}, {"interval": 10, "max_error": 2.0}])
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


def test_heun_looks_at_each_place_once(passes):
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
    return [cached(noise * t, torch.full((2,), t, dtype=torch.float64), labels).velocity for t in times]


def test_times_that_are_not_known_are_not_guessed(passes):
    """A number of steps says nothing of the times that the loop will ask for: each has its own gates."""
    times = [1.0, 0.9, 0.7, 0.4, 0.2, 0.1]
    by_number, by_list = cache(), cache()
    by_number.start(6)
    by_list.start([Evaluation(step, step, t) for step, t in enumerate(times)])
    results = [run_at(cached, times) for cached in (by_number, by_list)]
    assert passes == [(1, 2)] * 3 + [(3, 2)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_list_in_another_unit_of_time_than_the_models_is_not_trusted(passes):
    times = [1.0, 0.9, 0.7, 0.4, 0.2, 0.1]
    cached, expected = cache(), cache(num_steps=6)
    cached.start([Evaluation(step, step, 1000 * t) for step, t in enumerate(times)])
    torch.testing.assert_close(run_at(cached, times), run_at(expected, times), rtol=1e-9, atol=1e-9)
    assert passes == [(1, 2)] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_rounding_of_a_time_is_known(dtype, passes):
    noise, labels = small_noise()
    cached = wrap(small_sit().to(dtype), cache="taylor", interval=4, order=2, granularity="module")
    sample(cached, noise, labels, num_steps=10, sampler="euler-maruyama")
    assert passes == [(3, 2), (3, 2)]


def test_what_is_held_is_counted_and_forgotten():
    held = Corrections()
    places = [Place(1, 0.5), Place(2, 0.25)]
    held.keep(("label",), places, torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8))
    assert held.most_bytes == 2 * 3 * 5 * 8 * 4
    assert held.get(("label",), places[1]).added.shape == (3, 4, 8) and held.get(("null",), places[1]) is None
    held.clear()
    assert held.get(("label",), places[1]) is None and held.most_bytes > 0
    held.start()
    assert held.most_bytes == 0


def test_a_run_that_begins_anew_uses_nothing_of_the_one_before():
    noise, labels = small_noise(dtype=torch.float64)
    cached = cache()
    cached.start(evaluations("euler", 12))
    with torch.no_grad():
        for step in range(3):
            cached(noise, torch.full((2,), 1 - step / 12, dtype=torch.float64), labels)
    again = sample(cached, noise * 0.5, labels, num_steps=12)
    assert torch.equal(again, sample(cache(), noise * 0.5, labels, num_steps=12))
