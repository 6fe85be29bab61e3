from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from haste.errors import UserError
from haste.evaluation.metrics import Gaussian, check_sample_size, fit_gaussian, frechet_distance, symmetric_root


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
    monkeypatch.setattr("haste.evaluation.metrics.BLOCK", 64)
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
    with pytest.raises(UserError, match="64 samples are too few .* it needs more than 64, and 640"):
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
        (np.array([[1e200], [-1e200], [0]]), "as large as 1.0e[+]200, whose squares are beyond double precision"),
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
