from __future__ import annotations

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation.metrics import inception_score


def test_sure_answers_evenly_over_all_classes_score_their_number():
    score = inception_score(np.eye(8)[np.arange(40_000) % 8])
    assert score.mean == pytest.approx(8, rel=5e-3) and score.mean < 8


def test_one_class_or_no_idea_scores_one():
    assert inception_score(np.eye(8)[np.zeros(100, dtype=int)]) == pytest.approx((1, 0))
    assert inception_score(np.full((100, 8), 1 / 8)) == pytest.approx((1, 0))


def test_two_answers_have_their_closed_form():
    """p = (a, 1 − a) and its mirror in equal numbers: p(y) is uniform, so the score is 2·exp(−entropy of a)."""
    a = 0.9
    entropy = -(a * np.log(a) + (1 - a) * np.log(1 - a))
    score = inception_score(np.tile([[a, 1 - a], [1 - a, a]], (50_000, 1)))
    assert score.mean == pytest.approx(2 * np.exp(-entropy), rel=1e-3)


def test_samples_in_the_order_of_their_classes_score_as_in_any_other():
    ordered = np.eye(10)[np.repeat(np.arange(10), 1000)]
    assert inception_score(ordered).mean > 9.8  # ten parts as they come would each hold one class


def test_few_samples_bias_it_downwards():
    rng = np.random.default_rng(0)
    probabilities = np.eye(50)[rng.integers(50, size=20_000)]
    assert inception_score(probabilities[:200]).mean < inception_score(probabilities).mean - 10


def test_fewer_samples_than_parts_are_refused():
    with pytest.raises(UserError, match="9 samples are too few; it is taken over 10 parts"):
        inception_score(np.full((9, 3), 1 / 3))


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((20, 3), np.nan), "not finite"),
        (np.tile([1.5, -0.5, 0], (20, 1)), "reach down to -0.5"),
        (np.tile([3.0, 2.0, 1.0], (20, 1)), "sums from 6 to 6; they must be .* which logits become by a softmax"),
        (np.zeros((20, 0)), r"shape \(20, 0\); they must be numbers \(samples, classes\)"),
        (np.full(20, 0.5), "must be numbers"),
    ],
)
def test_what_are_no_probabilities_is_refused(probabilities, message):
    with pytest.raises(UserError, match=message):
        inception_score(probabilities)


def test_probabilities_rounded_to_half_precision_are_some():
    exact = np.random.default_rng(0).dirichlet(np.full(1000, 0.01), size=100)
    assert inception_score(exact.astype(np.float16)).mean == pytest.approx(inception_score(exact).mean, rel=1e-2)
