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


def fit_gaussian(features: np.ndarray, what: str = "samples") -> Gaussian:
    """Mean and unbiased covariance of features (N, D), any real dtype, computed in float64. what: for messages.

    Raises UserError if the features are not a matrix, are not finite, or are too few.
    """
    features = np.asarray(features)
    if features.ndim != 2:
        raise UserError(f"features have shape {features.shape}; they must be a matrix (samples, dimension)")
    count, dimension = features.shape
    check_sample_size(count, dimension, what)
    if not np.isfinite(features).all():
        raise UserError("features hold values that are not finite; the samples or the network are broken")
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((dimension, dimension))
    for start in range(0, count, BLOCK):
        centred = features[start : start + BLOCK] - mean
        scatter += centred.T @ centred
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

    Raises UserError if the dimensions differ and ArithmeticError if a matrix root fails its residual check.
    """
    if a.dimension != b.dimension:
        raise UserError(f"features have {a.dimension} and {b.dimension} dimensions; both sides need the same network")
    root_a = symmetric_root(a.covariance)
    cross = symmetric_root(root_a @ b.covariance @ root_a)
    mean_part = float(np.sum((a.mean - b.mean) ** 2))
    covariance_part = float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(cross))
    return max(mean_part + covariance_part, 0.0)  # equal Gaussians may come out at minus one rounding error


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semi-definite root of a symmetric positive semi-definite matrix (D, D), float64.

    Raises ArithmeticError if the square of the root is not the matrix again, which is also what happens when the
    matrix has an eigenvalue that is negative beyond rounding.
    """
    symmetric = (matrix + matrix.T) / 2.0
    values, vectors = np.linalg.eigh(symmetric)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    scale = np.linalg.norm(symmetric)
    residual = np.linalg.norm(root @ root - symmetric)
    if not residual <= ROOT_TOLERANCE * max(scale, np.finfo(np.float64).tiny):  # `not <=` also catches NaN
        raise ArithmeticError(
            f"matrix square root is wrong: relative residual {residual / max(scale, 1e-300):.1e}, "
            f"at most {ROOT_TOLERANCE:.0e} is accepted"
        )
    return root
