"""Fréchet distance between two sets of features, in double precision (Heusel et al., arXiv 1706.08500, eq. 6).

Each set is summarised by the Gaussian with its mean and covariance; the distance between the two Gaussians is

    d² = |μ_a − μ_b|² + tr(A) + tr(B) − 2·tr((A^½ B A^½)^½)

The usual form takes the root of the product A·B, which is not symmetric, with a general Schur method whose answer has
been silently wrong in some library versions. A^½ B A^½ is symmetric positive semi-definite and has the same
eigenvalues, so two symmetric eigen-decompositions suffice, and the residual of each root is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from haste.errors import UserError

# ‖root·root − matrix‖ / ‖matrix‖ of a healthy decomposition is about 1e-15 times the dimension.
ROOT_TOLERANCE = 1e-8

# What a covariance may fall short of symmetry, or of having no negative eigenvalue, by its rounding to single precision
# (6e-8 of an entry, times the root of some thousand dimensions): relative to its largest entry or eigenvalue.
ROUNDING = 1e-5

BLOCK = 4096  # feature vectors that are converted to double precision at once

# Below this many samples per feature dimension the estimated covariance is too noisy to compare small distances.
ADVISED_SAMPLES_PER_DIMENSION = 10


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), both float64, of `count` feature vectors; None: stored without their number."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @property
    def dimension(self) -> int:
        return self.mean.shape[0]


def check_features(features: np.ndarray) -> np.ndarray:
    """The features as an array, if they are a matrix (samples, dimension) of finite real numbers; UserError if not."""
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind not in "iuf":
        raise UserError(
            f"features are {features.dtype} of shape {features.shape}; they must be a matrix of numbers "
            "(samples, dimension)"
        )
    if not np.isfinite(features).all():
        raise UserError("features hold values that are not finite; the samples or the network are broken")
    return features


def fault_of_moments(mean: np.ndarray, covariance: np.ndarray) -> str | None:
    """What is wrong with a mean and a covariance, float64, as the end of a sentence about them; None if nothing is.

    Rounding to single precision is admitted: asymmetry and negative eigenvalues up to ROUNDING.
    """
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        return f"mu has shape {mean.shape} and sigma {covariance.shape}; they must be (D,) and (D, D)"
    for name, array in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(array).all():
            return f"{name} holds values that are not finite"
    scale = np.abs(covariance).max()
    if scale == 0:
        return "sigma is all zeros, as of a single image; it must be the covariance of many"
    asymmetry = np.abs(covariance - covariance.T)
    if asymmetry.max() > ROUNDING * scale:
        i, j = np.unravel_index(asymmetry.argmax(), asymmetry.shape)
        return (
            f"sigma is not symmetric, {covariance[i, j]:.6g} at ({i}, {j}) and {covariance[j, i]:.6g} at ({j}, {i}); "
            "it must be a covariance"
        )
    variances = covariance.diagonal()
    if variances.min() < -ROUNDING * scale:
        return f"sigma has the variance {variances.min():.6g} at {variances.argmin()}; none may be negative"
    values = np.linalg.eigvalsh((covariance + covariance.T) / 2)
    if values[0] < -ROUNDING * values[-1]:
        return f"sigma has the eigenvalue {values[0]:.6g} beside {values[-1]:.6g}; a covariance has none below 0"
    return None


def fit_gaussian(features: np.ndarray, what: str = "samples") -> Gaussian:
    """Mean and unbiased covariance of features (N, D), any real dtype, computed in float64. what: for messages.

    Raises UserError if the features are not a matrix, are not finite, are too few, or so large that their squares are
    beyond double precision.
    """
    features = check_features(features)
    count, dimension = features.shape
    check_sample_size(count, dimension, what)
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((dimension, dimension))
    for start in range(0, count, BLOCK):
        centred = features[start : start + BLOCK] - mean
        with np.errstate(over="ignore", invalid="ignore"):
            scatter += centred.T @ centred
    if not np.isfinite(scatter).all():
        largest = np.abs(features).max()
        raise UserError(f"features are as large as {largest:.1e}, whose squares are beyond double precision")
    return Gaussian(mean, scatter / (count - 1), count)


def check_sample_size(count: int, dimension: int, what: str = "samples") -> str | None:
    """One sentence of caution if `count` samples make the distance noisy in `dimension` dimensions, else None.

    Raises UserError if they are no more than the dimensions: the covariance is then singular, and the distance would
    measure the sample size.
    """
    advised = ADVISED_SAMPLES_PER_DIMENSION * dimension
    if count <= dimension:
        raise UserError(
            f"{count} {what} are too few for a Fréchet distance in {dimension} feature dimensions; it needs more "
            f"than {dimension}, and {advised} are advised"
        )
    if count >= advised:
        return None
    return (
        f"The distance rests on {count} {what} in {dimension} feature dimensions and is biased upwards; "
        f"compare it only with distances of as many {what}, or use at least {advised}."
    )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, the number published as FID; never negative.

    Raises UserError if the dimensions differ, and ArithmeticError if a matrix root fails its residual check or the
    distance is beyond double precision.
    """
    if a.dimension != b.dimension:
        raise UserError(f"features have {a.dimension} and {b.dimension} dimensions; both sides need the same network")
    root_a = symmetric_root(a.covariance)
    cross = symmetric_root(root_a @ b.covariance @ root_a)
    with np.errstate(over="ignore"):
        mean_part = float(np.sum((a.mean - b.mean) ** 2))
    covariance_part = float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(cross))
    distance = mean_part + covariance_part
    if not np.isfinite(distance):
        raise ArithmeticError(f"the distance is {distance}; the features are too large for double precision")
    return max(distance, 0.0)  # equal Gaussians may come out at minus one rounding error


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semi-definite root of a symmetric positive semi-definite matrix (D, D), float64.

    Eigenvalues that are negative by rounding alone (ROUNDING) count as 0. Raises ArithmeticError if the square of the
    root is not the matrix again, which is also what happens when one is further below 0.
    """
    symmetric = (matrix + matrix.T) / 2.0
    values, vectors = np.linalg.eigh(symmetric)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    scale = np.linalg.norm(symmetric)
    residual = np.linalg.norm(root @ root - symmetric)
    rounded = np.linalg.norm(np.clip(values, -ROUNDING * max(values[-1], 0.0), 0.0))
    if not residual <= ROOT_TOLERANCE * max(scale, np.finfo(np.float64).tiny) + rounded:  # `not <=` also catches NaN
        raise ArithmeticError(
            f"matrix square root is wrong: relative residual {residual / max(scale, 1e-300):.1e}, "
            f"at most {ROOT_TOLERANCE:.0e} is accepted, and {rounded / max(scale, 1e-300):.0e} for rounding below 0"
        )
    return root
