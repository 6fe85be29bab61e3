from __future__ import annotations

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation.metrics import kid, unbiased_mmd2


def cubic(x, y) -> float:
    return (float(np.dot(x, y)) / len(x) + 1.0) ** 3


def test_the_estimator_is_the_papers_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1.0
    within_x = [cubic(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [cubic(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [cubic(a, b) for a in x for b in y]
    expected = np.mean(within_x) + np.mean(within_y) - 2.0 * np.mean(across)
    assert unbiased_mmd2(x, y) == pytest.approx(expected, rel=1e-12)


def test_it_is_unbiased_at_few_samples():
    """Mean over 3,000 pairs of tiny sets of one distribution: 0 within four standard errors, both signs occurring."""
    rng = np.random.default_rng(1)
    values = [unbiased_mmd2(rng.standard_normal((5, 4)), rng.standard_normal((6, 4))) for _ in range(3000)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error and min(values) < 0 < max(values)


def test_a_coin_and_a_constant_have_their_closed_form():
    """x = ±1, y = c: E k(x, x') = (2³ + 0³)/2, k(y, y') = (c² + 1)³, E k(x, y) = ((1 + c)³ + (1 − c)³)/2."""
    c, count = 0.7, 1000
    x, y = np.where(np.arange(count) % 2, 1.0, -1.0)[:, None], np.full((count, 1), c)
    expected = 4.0 + (c**2 + 1.0) ** 3 - ((1.0 + c) ** 3 + (1.0 - c) ** 3)
    assert unbiased_mmd2(x, y) == pytest.approx(expected, abs=10 / count)


def test_subsets_are_repeatable_and_their_spread_is_given():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((300, 4)), rng.standard_normal((200, 4))
    first = kid(a, b, subsets=10, subset_size=50)
    assert first == kid(a, b, subsets=10, subset_size=50) and first.deviation > 0
    assert first != kid(a, b, subsets=10, subset_size=50, seed=1)
    whole = kid(a[:50], b[:50], subsets=3, subset_size=50)
    assert whole.deviation == pytest.approx(0, abs=1e-12)  # every subset is the whole set
    assert whole.mean == pytest.approx(unbiased_mmd2(a[:50], b[:50]), rel=1e-9)


def test_half_precision_features_are_computed_in_double():
    a = np.full((10, 4), 200.0, dtype=np.float16)  # its cubed products overflow float16
    assert kid(a, a, subsets=1, subset_size=10).mean == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("size", [1, 21])
def test_subsets_larger_than_a_set_are_refused(size):
    with pytest.raises(UserError, match=f"--kid-subset-size is {size}; it must be at least 2, and at most 20"):
        kid(np.zeros((30, 2)), np.zeros((20, 2)), subset_size=size)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_features_that_are_not_finite_are_refused(value):
    good, bad = np.ones((10, 2)), np.ones((10, 2))
    bad[3, 1] = value
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="not finite"):
            kid(*sides, subset_size=5)
    with pytest.raises(ArithmeticError, match="beyond double precision"):
        kid(1e160 * good, good, subset_size=5)


def test_features_of_two_networks_are_refused():
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        kid(np.zeros((5, 2)), np.zeros((5, 3)), subset_size=5)
