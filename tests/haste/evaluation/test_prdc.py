from __future__ import annotations

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation import metrics
from haste.evaluation.metrics import neighbour_radii, prdc
from scipy.spatial.distance import cdist


def by_definition(samples: np.ndarray, reference: np.ndarray) -> list[float]:
    """The four definitions, literally, on the whole matrix of distances."""

    def radii(points, k):
        return np.sort(cdist(points, points), axis=1)[:, k]

    distances = cdist(samples, reference)
    precision = (distances <= radii(reference, 3)[None]).any(axis=1).mean()
    recall = (distances <= radii(samples, 3)[:, None]).any(axis=0).mean()
    inside = distances <= radii(reference, 5)[None]
    return [precision, recall, inside.sum() / (5 * len(samples)), inside.any(axis=0).mean()]


def scores(samples, reference) -> list[float]:
    found = prdc(samples, reference)
    return [found.precision, found.recall, found.density, found.coverage]


@pytest.mark.parametrize("entries", [2**24, 500])
def test_they_are_their_definitions_in_one_block_or_in_many(monkeypatch, entries):
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", entries)
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((150, 3)), 1.5 * rng.standard_normal((120, 3)) + 0.5
    expected = by_definition(samples, reference)
    assert scores(samples, reference) == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0.1 and max(expected) < 1.4  # a case that tells


def test_blocks_are_no_larger_than_their_limit(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 500)
    points = np.random.default_rng(0).standard_normal((90, 2))
    assert max(block.size for _, block in metrics.distance_blocks(points, points)) <= 500


def test_identical_sets_are_wholly_in_each_other():
    points = np.random.default_rng(1).standard_normal((60, 4))
    precision, recall, density, coverage = scores(points, points)
    assert precision == recall == coverage == 1.0
    assert 1.0 <= density <= 1.2  # every ball holds its own centre and five neighbours, the last on its surface


def test_sets_far_apart_have_nothing_in_common():
    rng = np.random.default_rng(2)
    assert scores(rng.standard_normal((50, 3)), 100.0 + rng.standard_normal((40, 3))) == [0, 0, 0, 0]


def test_points_on_a_line_as_counted_by_hand():
    """Real images at 0, 1, …, 9: third neighbours at 3, 2, 2, …, 2, 3, fifth at 5, 4, 3, 3, …, 3, 4, 5."""
    reference = np.arange(10.0)[:, None]
    assert np.sqrt(neighbour_radii(reference, (3, 5))) == pytest.approx(
        np.array([[3, 2, 2, 2, 2, 2, 2, 2, 2, 3], [5, 4, 3, 3, 3, 3, 3, 3, 4, 5]])
    )
    samples = np.array([[4.6], [4.61], [4.62], [4.63], [4.64], [30.0]])
    found = prdc(samples, reference)
    assert found.precision == pytest.approx(5 / 6)
    # Each sample near 4.6 is within 3 of the real images 2 … 7, within 5 of 0, within 4 of 1 and 8 and within 5 of 9.
    assert found.density == pytest.approx(5 * 10 / (5 * 6))
    assert found.coverage == 1.0
    # The balls of the first five samples are at most 0.04 wide; the one at 30 reaches 25.38 down, to all of them, so
    # to every real image from 4.62 on.
    assert found.recall == pytest.approx(5 / 10)


def test_dropped_modes_cost_recall_and_coverage_but_no_precision():
    rng = np.random.default_rng(3)
    reference = np.concatenate([rng.standard_normal((100, 2)), 50 + rng.standard_normal((100, 2))])
    found = prdc(rng.standard_normal((200, 2)), reference)
    assert found.precision > 0.9 and found.recall < 0.55 and found.coverage < 0.55


def test_far_from_the_origin_no_digits_are_lost():
    rng = np.random.default_rng(4)
    samples, reference = rng.standard_normal((80, 3)), rng.standard_normal((80, 3))
    assert scores(samples + 1e6, reference + 1e6) == pytest.approx(scores(samples, reference), abs=1e-9)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_features_that_are_not_finite_are_refused(value):
    good, bad = np.random.default_rng(0).standard_normal((2, 10, 2))
    bad[3, 1] = value
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="not finite"):
            prdc(*sides)
    with pytest.raises(ArithmeticError, match="beyond double precision"):
        prdc(1e160 * good, good)


def test_too_few_points_and_two_networks_are_refused():
    with pytest.raises(UserError, match="5 images are too few; it takes more than 5"):
        prdc(np.zeros((5, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        prdc(np.zeros((9, 2)), np.zeros((9, 3)))
