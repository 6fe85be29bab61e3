"""Weights against the published recurrences, run on numbers, and on polynomials; and what is kept of which steps."""

from __future__ import annotations

import math

import pytest
import torch
from caching_models import small_sit
from haste.caching import CacheConfig, make_cache
from haste.caching.forecaster import CachedFeatures, Forecaster, Timestep
from hypothesis import given
from hypothesis import strategies as st


def at_positions(positions) -> list[Timestep]:
    return [Timestep(position, math.nan) for position in positions]


def taylor(order: int, positions, at: float) -> list[float]:
    return Forecaster("taylor", order).weights(at_positions(positions), Timestep(at, math.nan))


def newton(order: int, times, at: float) -> list[float]:
    return Forecaster("newton", order).weights([Timestep(math.nan, time) for time in times], Timestep(math.nan, at))


def differences(features: list[float], positions: list[float], order: int) -> list[float]:
    """T_0 … T_order as the published update leaves them, full step by full step, oldest first."""
    terms: list[float] = []
    for index, feature in enumerate(features):
        new = [feature]
        for i in range(min(order, len(terms))):
            new.append((new[i] - terms[i]) / (positions[index] - positions[index - 1]))
        terms = new
    return terms


def recurrence(features: list[float], positions: list[float], order: int, at: float) -> float:
    """The published update, then the Taylor sum."""
    terms = differences(features, positions, order)
    x = at - positions[-1]
    return sum(term * x**i / math.factorial(i) for i, term in enumerate(terms))


def forecast(features: list[float], positions: list[float], order: int, at: float) -> float:
    """What a ring of order + 1 cached features gives: the newest ones alone, newest first."""
    kept = slice(None, -order - 2, -1)
    weights = taylor(order, positions[kept], at)
    return sum(weight * feature for weight, feature in zip(weights, features[kept], strict=True))


@given(
    features=st.lists(st.floats(-10, 10), min_size=1, max_size=9),
    gaps=st.lists(st.integers(1, 6), min_size=9, max_size=9),
    order=st.integers(0, 4),
    ahead=st.integers(0, 6),
)
def test_the_last_cached_features_carry_the_whole_recurrence(features, gaps, order, ahead):
    positions = [float(sum(gaps[:index])) for index in range(len(features))]
    at = positions[-1] + ahead
    expected = recurrence(features, positions, order, at)
    assert forecast(features, positions, order, at) == pytest.approx(expected, rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("first_enhance", [1, 2, 3, 4])
@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("interval", range(2, 7))
def test_the_published_code_with_any_first_enhance(interval, order, first_enhance):
    """There, differences are formed from step first_enhance - 1 on: the steps before leave the feature alone."""
    cached = make_cache(small_sit(), CacheConfig(cache="taylor", interval=interval, order=order,
                                                   first_enhance=first_enhance))  # fmt: skip
    features = [math.sin(3.7 * step) + 0.1 * step for step in range(30)]
    terms: list[float] = []
    last, taken = None, []
    for step, feature in enumerate(features):
        full = step < first_enhance or step - last == interval
        if full:
            new = [feature]
            for i in range(order):
                if i < len(terms) and step > first_enhance - 2:
                    new.append((new[i] - terms[i]) / (step - last))
            terms, last, taken = new, step, [step, *taken][: order + 1]
            continue
        expected = sum(term * (step - last) ** i / math.factorial(i) for i, term in enumerate(terms))
        weights = cached.forecaster.weights(at_positions(taken), Timestep(step, 0))
        got = sum(weight * features[place] for weight, place in zip(weights, taken, strict=True))
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "settings, first",
    [
        ({"first_enhance": 2}, 0), ({"first_enhance": 3}, 1), ({"first_enhance": 5}, 3),
        ({"first_enhance": 5, "error_threshold": 0.1}, 0), ({"full_steps": "0,1,2,6,10"}, 0), ({"spacing": "even"}, 0),
    ],
)  # fmt: skip
def test_differences_begin_late_only_where_the_published_code_has_a_beginning(settings, first):
    """Steps 0, 1, 2 and 6 as a list of full steps are forecast from all three newest, at order 2."""
    forecaster = Forecaster.of(CacheConfig(cache="taylor", order=2, **settings))
    assert forecaster.first == first
    weights = forecaster.weights(at_positions([2, 1, 0]), Timestep(4, 0))
    late = [1.0, 0.0, 0.0] if first > 1 else taylor(1, [2, 1], 4) + [0.0]
    assert weights == pytest.approx(late if first else taylor(2, [2, 1, 0], 4))


def test_counting_down_gives_the_same():
    """The published coordinate is the number of steps that remain."""
    up, down = [9, 5, 1, 0], [40, 44, 48, 49]
    assert taylor(3, up, 11) == pytest.approx(taylor(3, down, 38))


def test_first_order_by_hand():
    """F + (F − F_old)/4 · 3."""
    assert taylor(1, [9, 5], 12) == pytest.approx([1.75, -0.75])


def test_what_it_predicts_of_a_line_and_of_a_parabola():
    """A line is exact from order 1 on. Of s² at equal distance d order 2 gives s² + (2s − d)x + x², where the true
    value is s² + 2sx + x²: backward differences, as published, are late by d·x."""
    positions, at = [12, 8, 4], 14
    line = taylor(2, positions, at)
    assert sum(w * (3 * p + 1) for w, p in zip(line, positions, strict=True)) == pytest.approx(3 * at + 1)
    parabola = sum(w * p**2 for w, p in zip(line, positions, strict=True))
    assert parabola == pytest.approx(at**2 - 4 * 2)


def test_early_cached_features_give_a_lower_order_and_late_ones_are_not_looked_at():
    assert taylor(4, [0], 3) == [1.0]
    assert taylor(4, [5, 1], 7) == taylor(1, [5, 1], 7)
    assert taylor(0, [5, 1], 7) == [1.0, 0.0]


@given(
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    gaps=st.lists(st.floats(0.05, 0.3), min_size=5, max_size=5),
    ahead=st.floats(0.01, 0.4),
)
def test_newton_is_exact_on_polynomials_however_the_full_steps_are_spaced(coefficients, gaps, ahead):
    """Times count down from 1, newest last in the run and first in the ring."""
    order = len(coefficients) - 1
    times = [1 - sum(gaps[:index]) for index in range(order + 1)][::-1]

    def polynomial(t):
        return sum(c * t**i for i, c in enumerate(coefficients))

    weights = newton(order, times, times[0] - ahead)
    forecast = sum(w * polynomial(t) for w, t in zip(weights, times, strict=True))
    scale = sum(abs(w) for w in weights) * 20
    assert forecast == pytest.approx(polynomial(times[0] - ahead), abs=1e-12 * scale)


def test_newton_uses_the_newest_and_says_so_by_zeros():
    weights = newton(1, [0.4, 0.5, 0.9], 0.3)
    assert weights == pytest.approx([2.0, -1.0, 0.0])


@pytest.mark.parametrize("order", range(5))
def test_hermite_against_its_explicit_polynomials(order):
    """H_0 to H_4 of the physicists, written out, over the published recurrence's differences."""
    explicit = [
        lambda x: 1,
        lambda x: 2 * x,
        lambda x: 4 * x**2 - 2,
        lambda x: 8 * x**3 - 12 * x,
        lambda x: 16 * x**4 - 48 * x**2 + 12,
    ]
    features, positions, at, sigma = [1.0, 3.0, -2.0, 0.5, 4.0], [0.0, 1.0, 5.0, 9.0, 13.0], 15.0, 0.5
    terms = differences(features, positions, order)
    x = at - positions[-1]
    expected = sum(
        term * sigma**i * explicit[i](sigma * x) / math.factorial(i) for i, term in enumerate(terms[: order + 1])
    )
    kept = slice(None, -order - 2, -1)
    weights = Forecaster("hermite", order).weights(at_positions(positions[kept]), Timestep(at, 0))
    assert sum(w * f for w, f in zip(weights, features[kept], strict=True)) == pytest.approx(expected)


def test_what_each_cache_forecasts_with():
    caches = ("reuse", "taylor", "newton", "hermite", "delta-dit")
    made = [make_cache(small_sit(), CacheConfig(cache=cache)).forecaster for cache in caches]
    assert [(forecaster.kind, forecaster.order) for forecaster in made] == [
        ("taylor", 0), ("taylor", 4), ("newton", 4), ("hermite", 4), ("taylor", 0)
    ]  # fmt: skip
    assert taylor(0, [7, 3], 9) == [1.0, 0.0]


# ---- the cached features ----

BOTH = ("cond", "uncond")


def filled(positions: list[int], slots: int = 3) -> CachedFeatures:
    """Two modules, one row per branch; the feature at position p is p for "cond" and p + 0.5 for "uncond"."""
    ring = CachedFeatures(modules=2, slots=slots)
    ring.reserve(2, 3, 4, torch.float32, torch.device("cpu"))
    for position in positions:
        write(ring, position, BOTH)
    return ring


def write(ring: CachedFeatures, position: int, branches: tuple[str, ...], offset: float = 0.0) -> None:
    slot = ring.slot_for(Timestep(position, 1 - position / 100), branches)
    for row, branch in enumerate(BOTH):
        if branch in branches:
            ring.storage[:, slot, row] = position + row / 2 + offset


def kept(ring: CachedFeatures, branch: str) -> list[float]:
    """The features behind a branch's places, newest first, found by weights of 1."""
    unit = torch.eye(len(ring.timesteps(branch))).tolist()
    slots = [ring.by_slot(weights, branch).index(1.0) for weights in unit]
    return [ring.storage[1, slot, BOTH.index(branch), 0, 0].item() for slot in slots]


def positions(ring: CachedFeatures, branch: str) -> list[float]:
    return [place.position for place in ring.timesteps(branch)]


def test_it_keeps_the_newest_and_overwrites_the_oldest_in_place():
    ring = filled([0, 1, 5])
    storage = ring.storage.data_ptr()
    assert positions(ring, "cond") == [5, 1, 0] and kept(ring, "cond") == [5, 1, 0]
    for position in (9, 13):
        write(ring, position, BOTH)
    assert positions(ring, "cond") == [13, 9, 5] and kept(ring, "cond") == [13, 9, 5]
    assert ring.storage.data_ptr() == storage and ring.storage.shape == (2, 3, 2, 3, 4)
    assert ring.bytes == 2 * 3 * 2 * 3 * 4 * 4


def test_a_second_snapshot_at_one_position_takes_the_place_of_the_first():
    ring = filled([0, 1])
    write(ring, 1, BOTH, offset=6.0)
    assert positions(ring, "uncond") == [1, 0] and kept(ring, "uncond") == [7.5, 0.5]


def test_branches_that_come_one_after_the_other_share_a_slot():
    ring = filled([])
    for position in (0, 1, 5, 9):
        write(ring, position, ("cond",))
        write(ring, position, ("uncond",))
    assert kept(ring, "cond") == [9, 5, 1] and kept(ring, "uncond") == [9.5, 5.5, 1.5]


def test_a_branch_that_sits_out_keeps_its_own_until_they_are_overwritten():
    ring = filled([0, 1])
    write(ring, 5, ("cond",))
    assert kept(ring, "cond") == [5, 1, 0] and kept(ring, "uncond") == [1.5, 0.5]
    write(ring, 9, ("cond",))
    write(ring, 13, ("cond",))
    assert kept(ring, "cond") == [13, 9, 5] and ring.timesteps("uncond") == []


def test_slots_that_do_not_hold_a_branch_have_weight_zero():
    ring = filled([0, 1], slots=5)
    write(ring, 5, ("cond",))
    assert ring.by_slot([2.0, -1.0, 4.0], "cond") == [4, -1, 2, 0, 0]
    assert ring.by_slot([2.0, -1.0], "uncond") == [-1, 2, 0, 0, 0]


def test_other_rows_or_another_type_begin_anew_and_a_run_keeps_the_memory():
    ring = filled([0])
    cpu, storage = torch.device("cpu"), ring.storage.data_ptr()
    ring.reserve(2, 3, 4, torch.float32, cpu)
    assert positions(ring, "cond") == [0]
    ring.clear()
    assert ring.timesteps("cond") == [] and ring.storage.data_ptr() == storage
    write(ring, 3, BOTH)
    ring.reserve(4, 3, 4, torch.float32, cpu)
    assert ring.timesteps("cond") == [] and ring.storage.shape[2] == 4
    write(ring, 4, BOTH)
    ring.reserve(4, 3, 4, torch.bfloat16, cpu)
    assert ring.timesteps("cond") == [] and ring.storage.dtype == torch.bfloat16
    ring.release()
    assert ring.storage.numel() == 0 and ring.bytes == 0
