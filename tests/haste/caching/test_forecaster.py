"""The forecasters' weights against the published recurrences, run on numbers, and on polynomials."""

from __future__ import annotations

import math

import pytest
from caching_models import small_sit
from haste.caching import CacheConfig, make_cache
from haste.caching.forecaster import HermiteForecaster, NewtonForecaster, TaylorForecaster, make_forecaster
from haste.errors import UserError
from hypothesis import given
from hypothesis import strategies as st


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
    """What a ring of order + 1 snapshots gives: the newest ones alone, newest first."""
    kept = slice(None, -order - 2, -1)
    weights = TaylorForecaster(order).weights(positions[kept], at)
    return sum(weight * feature for weight, feature in zip(weights, features[kept], strict=True))


@given(
    features=st.lists(st.floats(-10, 10), min_size=1, max_size=9),
    gaps=st.lists(st.integers(1, 6), min_size=9, max_size=9),
    order=st.integers(0, 4),
    ahead=st.integers(0, 6),
)
def test_the_last_snapshots_carry_the_whole_recurrence(features, gaps, order, ahead):
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
        assert full == cached.schedule.is_full(step, last)
        if full:
            new = [feature]
            for i in range(order):
                if i < len(terms) and step > first_enhance - 2:
                    new.append((new[i] - terms[i]) / (step - last))
            terms, last, taken = new, step, [step, *taken][: order + 1]
            continue
        expected = sum(term * (step - last) ** i / math.factorial(i) for i, term in enumerate(terms))
        weights = cached.forecaster.weights(taken, step)
        got = sum(weight * features[place] for weight, place in zip(weights, taken, strict=True))
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_counting_down_gives_the_same():
    """The published coordinate is the number of steps that remain."""
    up, down = [9, 5, 1, 0], [40, 44, 48, 49]
    assert TaylorForecaster(3).weights(up, 11) == pytest.approx(TaylorForecaster(3).weights(down, 38))


def test_first_order_by_hand():
    """F + (F − F_old)/4 · 3."""
    assert TaylorForecaster(1).weights([9, 5], 12) == pytest.approx([1.75, -0.75])


def test_what_it_predicts_of_a_line_and_of_a_parabola():
    """A line is exact from order 1 on. Of s² at equal distance d order 2 gives s² + (2s − d)x + x², where the true
    value is s² + 2sx + x²: backward differences, as published, are late by d·x."""
    positions, at = [12, 8, 4], 14
    line = TaylorForecaster(2).weights(positions, at)
    assert sum(w * (3 * p + 1) for w, p in zip(line, positions, strict=True)) == pytest.approx(3 * at + 1)
    parabola = sum(w * p**2 for w, p in zip(line, positions, strict=True))
    assert parabola == pytest.approx(at**2 - 4 * 2)


def test_early_snapshots_give_a_lower_order_and_late_ones_are_not_looked_at():
    assert TaylorForecaster(4).weights([0], 3) == [1.0]
    assert TaylorForecaster(4).weights([5, 1], 7) == TaylorForecaster(1).weights([5, 1], 7)
    assert TaylorForecaster(0).weights([5, 1], 7) == [1.0, 0.0]


def test_negative_order():
    with pytest.raises(UserError, match="--order must be at least 0, got -1"):
        TaylorForecaster(-1)


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

    weights = NewtonForecaster(order).weights(times, times[0] - ahead)
    forecast = sum(w * polynomial(t) for w, t in zip(weights, times, strict=True))
    scale = sum(abs(w) for w in weights) * 20
    assert forecast == pytest.approx(polynomial(times[0] - ahead), abs=1e-12 * scale)


def test_newton_uses_the_newest_and_says_so_by_zeros():
    weights = NewtonForecaster(1).weights([0.4, 0.5, 0.9], 0.3)
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
    weights = HermiteForecaster(order).weights(positions[kept], at)
    assert sum(w * f for w, f in zip(weights, features[kept], strict=True)) == pytest.approx(expected)


def test_names():
    assert make_forecaster("reuse", 0).weights([7, 3], 9) == [1.0, 0.0]
    kinds = [type(make_forecaster(name, 2)) for name in ("taylor", "newton", "hermite")]
    assert kinds == [TaylorForecaster, NewtonForecaster, HermiteForecaster]
    assert [make_forecaster(name, 1).coordinate for name in ("taylor", "newton", "hermite")] == [
        "position", "time", "position"
    ]  # fmt: skip
