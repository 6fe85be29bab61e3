from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from haste.errors import UserError
from haste.metrics.formulas import (
    Gaussian,
    check_sample_size,
    distance_blocks,
    fit_gaussian,
    frechet_distance,
    inception_score,
    kid,
    neighbour_radii,
    prdc,
    split_half_fd,
    symmetric_root,
    unbiased_mmd2,
)
from scipy.spatial.distance import cdist

# ---- FD ----


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64), 1000)


def random_covariance(rng: np.random.Generator, dimension: int) -> np.ndarray:
    factor = rng.standard_normal((dimension, 2 * dimension))
    return factor @ factor.T / dimension + 0.1 * np.eye(dimension)


def test_gaussians_with_commuting_covariances_have_the_closed_form():
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    sd_a, sd_b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.0])
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((sd_a - sd_b) ** 2)
    distance = frechet_distance(gaussian(mean_a, np.diag(sd_a**2)), gaussian(mean_b, np.diag(sd_b**2)))
    assert distance == pytest.approx(expected, rel=1e-13)


def test_one_dimension_is_the_wasserstein_distance_of_two_normals():
    assert frechet_distance(gaussian([0], [[4]]), gaussian([3], [[25]])) == pytest.approx(3**2 + (5 - 2) ** 2)


@pytest.mark.parametrize("dimension", [2, 17, 64])
def test_it_agrees_with_scipys_root_of_the_product(dimension):
    rng = np.random.default_rng(dimension)
    a = gaussian(rng.standard_normal(dimension), random_covariance(rng, dimension))
    b = gaussian(rng.standard_normal(dimension), random_covariance(rng, dimension))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    assert np.allclose(root @ root, a.covariance @ b.covariance, rtol=1e-9, atol=1e-9)  # what is compared with is right
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_a_gaussian_is_at_no_distance_from_itself_even_if_its_covariance_is_singular():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((8, 3))
    flat = gaussian(rng.standard_normal(8), factor @ factor.T)
    assert 0 <= frechet_distance(flat, flat) < 1e-10


def test_moments_are_numpys_in_double_precision():
    features = (1e4 + np.random.default_rng(0).standard_normal((500, 5))).astype(np.float32)
    fitted = fit_gaussian(features)
    assert fitted.mean.dtype == fitted.covariance.dtype == np.float64
    assert fitted.covariance == pytest.approx(np.cov(features.astype(np.float64).T), rel=1e-12)
    assert fitted.count == 500 and fitted.dimension == 5


def test_moments_of_more_than_one_block_are_those_of_all(monkeypatch):
    monkeypatch.setattr("haste.metrics.formulas.BLOCK", 64)
    features = np.random.default_rng(1).standard_normal((150, 3))
    assert fit_gaussian(features).covariance == pytest.approx(np.cov(features.T), rel=1e-12)


def test_samples_of_shifted_gaussians_are_as_far_apart_as_these():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((20_000, 4)), 2.0 * rng.standard_normal((20_000, 4)) + 0.5
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(4 * 0.5**2 + 4 * (2 - 1) ** 2, rel=0.05)


def test_one_feature_is_a_one_by_one_covariance():
    assert fit_gaussian(np.array([[1.0], [2.0], [3.0]])).covariance == pytest.approx(np.array([[1.0]]))


def test_a_root_of_a_matrix_that_has_none_is_reported():
    with pytest.raises(ArithmeticError, match="relative residual"):
        symmetric_root(np.diag([1.0, -0.5]))


def test_a_root_with_not_a_number_in_it_is_reported(monkeypatch):
    broken = (np.array([1.0, np.nan]), np.eye(2))
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: broken)
    with pytest.raises(ArithmeticError):
        symmetric_root(np.eye(2))


def test_too_few_samples_are_refused_with_the_number_that_would_do():
    with pytest.raises(UserError, match="64 samples are too few .* it needs more than 64, better 640"):
        fit_gaussian(np.zeros((64, 64)))


def test_few_samples_come_with_a_caution_and_many_without():
    assert "biased upwards" in check_sample_size(100, 64)
    assert check_sample_size(640, 64) is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(10), "must be a matrix"),
        (np.zeros((0, 3)), "0 samples are too few"),
        (np.zeros((1, 3)), "1 samples are too few"),
        (np.zeros((10, 0)), "must be a matrix"),
        (np.zeros((10, 2), dtype=complex), "must be a matrix of numbers"),
        (np.full((10, 2), np.inf), "not finite"),
        (np.array([[1e200], [-1e200], [0]]), "must have squares within double precision, got 1.0e[+]200"),
    ],
)
def test_features_that_are_none_are_refused(features, message):
    with pytest.raises(UserError, match=message):
        fit_gaussian(features)


def test_a_distance_beyond_double_precision_is_no_distance():
    with pytest.raises(ArithmeticError, match="too large for double precision"):
        frechet_distance(gaussian([1e200], [[1]]), gaussian([0], [[1]]))


def test_features_of_two_networks_are_refused():
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))


def test_the_fd_of_two_halves_is_that_of_random_ones():
    features = np.random.default_rng(5).standard_normal((400, 3))
    ordered = features[np.argsort(features[:, 0])]
    assert split_half_fd(features) == split_half_fd(features) < 0.2
    assert split_half_fd(ordered) < 0.2 < frechet_distance(fit_gaussian(ordered[:200]), fit_gaussian(ordered[200:]))


# ---- KID ----


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
    with pytest.raises(UserError, match=f"--kid-subset-size must be from 2 to 20, .* got {size}"):
        kid(np.zeros((30, 2)), np.zeros((20, 2)), subset_size=size)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_features_that_are_not_finite_have_no_kid(value):
    good, bad = np.ones((10, 2)), np.ones((10, 2))
    bad[3, 1] = value
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="not finite"):
            kid(*sides, subset_size=5)
    with pytest.raises(ArithmeticError, match="beyond double precision"):
        kid(1e160 * good, good, subset_size=5)


def test_features_of_two_networks_have_no_kid():
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        kid(np.zeros((5, 2)), np.zeros((5, 3)), subset_size=5)


# ---- PRDC ----


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
    monkeypatch.setattr("haste.metrics.formulas.BLOCK_ENTRIES", entries)
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((150, 3)), 1.5 * rng.standard_normal((120, 3)) + 0.5
    expected = by_definition(samples, reference)
    assert scores(samples, reference) == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0.1 and max(expected) < 1.4  # a case that tells


def test_blocks_are_no_larger_than_their_limit(monkeypatch):
    monkeypatch.setattr("haste.metrics.formulas.BLOCK_ENTRIES", 500)
    points = np.random.default_rng(0).standard_normal((90, 2))
    assert max(block.size for _, block in distance_blocks(points, points)) <= 500


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
def test_features_that_are_not_finite_have_no_prdc(value):
    good, bad = np.random.default_rng(0).standard_normal((2, 10, 2))
    bad[3, 1] = value
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match="not finite"):
            prdc(*sides)
    with pytest.raises(ArithmeticError, match="beyond double precision"):
        prdc(1e160 * good, good)


def test_too_few_points_and_two_networks_are_refused():
    with pytest.raises(UserError, match="must be more than 5 each, got 5"):
        prdc(np.zeros((5, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        prdc(np.zeros((9, 2)), np.zeros((9, 3)))


# ---- Inception score ----


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
    with pytest.raises(UserError, match="samples must be at least 10, .* got 9"):
        inception_score(np.full((9, 3), 1 / 3))


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((20, 3), np.nan), "not finite"),
        (np.tile([1.5, -0.5, 0], (20, 1)), "class probabilities must be from 0 to 1 .* -0.5"),
        (np.tile([3.0, 2.0, 1.0], (20, 1)), "class probabilities must be .* sums from 6 to 6"),
        (np.zeros((20, 0)), r"must be a matrix of numbers \(samples, classes\), got float64 \(20, 0\)"),
        (np.full(20, 0.5), "must be a matrix of numbers"),
    ],
)
def test_what_are_no_probabilities_is_refused(probabilities, message):
    with pytest.raises(UserError, match=message):
        inception_score(probabilities)


def test_probabilities_rounded_to_half_precision_are_some():
    exact = np.random.default_rng(0).dirichlet(np.full(1000, 0.01), size=100)
    assert inception_score(exact.astype(np.float16)).mean == pytest.approx(inception_score(exact).mean, rel=1e-2)
