"""FD, KID, PRDC and Inception score of features and class probabilities, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from haste.errors import UserError, require

# ‖root·root − matrix‖ / ‖matrix‖ of a healthy decomposition is about 1e-15 times the dimension.
ROOT_TOLERANCE = 1e-8

# Tolerated asymmetry and negative eigenvalues of a covariance in single precision, relative to its largest entry or
# eigenvalue: 6e-8 per entry, times the root of some thousand dimensions.
ROUNDING = 1e-5

BLOCK = 4096  # feature vectors that are converted to double precision at a time
BLOCK_ENTRIES = 2**24  # distances in memory at a time: 128 MiB in double precision

# Below this many samples per feature dimension the estimated covariance is too noisy to compare small FDs.
ADVISED_SAMPLES_PER_DIMENSION = 10

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
SPLITS = 10  # of the Inception score
SUM_ROUNDING = 1e-2  # tolerated deviation of probabilities from a sum of 1, as in bfloat16
HALVES_SEED = 271828


class MeanAndDeviation(NamedTuple):
    """A score's mean and standard deviation over random subsets or parts."""

    mean: float
    deviation: float


def _check_matrix(matrix: np.ndarray, what: str, columns: str) -> np.ndarray:
    """Convert to an array. Raises UserError unless it is a matrix (samples, columns) of finite real numbers."""
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.dtype.kind not in "iuf":
        raise UserError(f"{what} must be a matrix of numbers (samples, {columns}), got {matrix.dtype} {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise UserError(f"{what} are not finite; the samples or the network are broken")
    return matrix


def _check_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert features to arrays. Raises UserError unless they are matrices of the same dimension."""
    a, b = (_check_matrix(features, "features", "dimension") for features in (a, b))
    _check_dimensions(a.shape[1], b.shape[1])
    return a, b


def _check_dimensions(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"samples and reference must have features of the same network, got {a} and {b} dimensions")


# ---- FD ----


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), both float64, of `count` feature vectors (None if that is unknown)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @property
    def dimension(self) -> int:
        return self.mean.shape[0]


def fit_gaussian(features: np.ndarray, what: str = "samples") -> Gaussian:
    """Mean and unbiased covariance of features.

    Args:
        features: (N, D), any real dtype; computed in float64.
        what: the kind of images, for messages.

    Raises:
        UserError: the features are no matrix, not finite, too few, or so large that their squares overflow float64.
    """
    features = _check_matrix(features, "features", "dimension")
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
        raise UserError(f"features must have squares within double precision, got {largest:.1e}")
    return Gaussian(mean, scatter / (count - 1), count)


def check_sample_size(count: int, dimension: int, what: str = "samples") -> str | None:
    """A caution if so few samples bias the FD, else None. Raises UserError if the covariance would be singular."""
    advised = ADVISED_SAMPLES_PER_DIMENSION * dimension
    if count <= dimension:
        raise UserError(
            f"{count} {what} are too few for an FD in {dimension} feature dimensions; it needs more than {dimension}, "
            f"better {advised}"
        )
    if count >= advised:
        return None
    return (
        f"The FD rests on {count} {what} in {dimension} feature dimensions and is biased upwards; "
        f"compare it only with FDs of as many {what}, or use at least {advised}."
    )


def fault_of_moments(mean: np.ndarray, covariance: np.ndarray, mu: str = "mu", sigma: str = "sigma") -> str | None:
    """Why a mean and a covariance are invalid, beyond ROUNDING, to end a sentence about arrays of these names; None if
    they are valid."""
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        return f"{mu} and {sigma} must be (D,) and (D, D), got {mean.shape} and {covariance.shape}"
    for name, array in ((mu, mean), (sigma, covariance)):
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    scale = np.abs(covariance).max()
    if scale == 0:
        return f"{sigma} is all zeros, as for a single image"
    asymmetry = np.abs(covariance - covariance.T)
    if asymmetry.max() > ROUNDING * scale:
        i, j = np.unravel_index(asymmetry.argmax(), asymmetry.shape)
        pair = f"{covariance[i, j]:.6g} at ({i}, {j}) and {covariance[j, i]:.6g} at ({j}, {i})"
        return f"{sigma} is not symmetric, {pair}"
    variances = covariance.diagonal()
    if variances.min() < -ROUNDING * scale:
        return f"{sigma} has the negative variance {variances.min():.6g} at {variances.argmin()}"
    values = np.linalg.eigvalsh((covariance + covariance.T) / 2)
    if values[0] < -ROUNDING * values[-1]:
        return f"{sigma} has the negative eigenvalue {values[0]:.6g} beside {values[-1]:.6g}"
    return None


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """FD, the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6):

        d² = |μ_a − μ_b|² + tr(A) + tr(B) − 2·tr((A^½ B A^½)^½)

    It is FID in the features of FID's Inception, sFID in its spatial features, FD-DINOv2 in those of DINOv2. Common
    implementations take the root of A·B, which is not symmetric, by a Schur method that has been silently wrong in some
    library versions. A^½ B A^½ is symmetric positive semi-definite with the same eigenvalues, so two symmetric
    eigendecompositions suffice.

    Returns:
        At least 0.

    Raises:
        UserError: the dimensions differ.
        ArithmeticError: a matrix root fails its residual check, or the distance overflows.
    """
    _check_dimensions(a.dimension, b.dimension)
    root_a = symmetric_root(a.covariance)
    cross = symmetric_root(root_a @ b.covariance @ root_a)
    with np.errstate(over="ignore"):
        mean_part = float(np.sum((a.mean - b.mean) ** 2))
    covariance_part = float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(cross))
    distance = mean_part + covariance_part
    if not np.isfinite(distance):
        raise ArithmeticError(f"the FD is {distance}; the features are too large for double precision")
    return max(distance, 0.0)  # rounding may make it negative for equal Gaussians


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semi-definite root of a symmetric positive semi-definite matrix (D, D), float64.

    Eigenvalues that are negative by rounding (ROUNDING) count as 0. Raises ArithmeticError if the square of the root is
    not the matrix, as for eigenvalues further below 0.
    """
    symmetric = (matrix + matrix.T) / 2.0
    values, vectors = np.linalg.eigh(symmetric)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    scale = float(np.linalg.norm(symmetric))
    residual = np.linalg.norm(root @ root - symmetric)
    rounded = np.linalg.norm(np.clip(values, -ROUNDING * max(values[-1], 0.0), 0.0))
    if not residual <= ROOT_TOLERANCE * max(scale, np.finfo(np.float64).tiny) + rounded:  # `not <=` also catches NaN
        raise ArithmeticError(
            f"matrix square root is wrong: relative residual {residual / max(scale, 1e-300):.1e}, "
            f"at most {ROOT_TOLERANCE:.0e} is accepted, and {rounded / max(scale, 1e-300):.0e} for rounding below 0"
        )
    return root


def split_half_fd(features: np.ndarray) -> float:
    """FD between two random halves of features (N, D)."""
    order = np.random.default_rng(HALVES_SEED).permutation(len(features))
    first, second = np.array_split(features[order], 2)
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


# ---- KID ----


def kid(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> MeanAndDeviation:
    """Kernel Inception distance: MMD² under the kernel (x·y / D + 1)³ (Bińkowski et al., arXiv 1801.01401, section 4).

    For equal distributions its expectation is 0, at any number of samples, and a value may be negative. As in the
    paper it is averaged over random subsets, each without replacement.

    Args:
        a, b: features (N, D) and (M, D), any real dtype; computed in float64.
        subsets, subset_size: of the average; three matrices (subset_size, subset_size) are in memory at a time.
        seed: of the subsets.

    Raises:
        UserError: the features are no finite matrices of one dimension, or fewer than a subset.
        ArithmeticError: the kernel overflows.
    """
    a, b = _check_pair(a, b)
    most = min(len(a), len(b))
    if most < 2:
        raise UserError(f"a KID must have 2 samples and 2 real images or more, got {len(a)} and {len(b)}")
    if not 2 <= subset_size <= most:
        raise UserError(
            f"--kid-subset-size must be from 2 to {most:,}, the smaller number of images, got {subset_size:,}"
        )
    rng = np.random.default_rng(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        return features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)

    with np.errstate(over="ignore", invalid="ignore"):
        values = [unbiased_mmd2(subset(a), subset(b)) for _ in range(subsets)]
    if not np.isfinite(values).all():
        raise ArithmeticError("the kernel of these features is beyond double precision; they are too large")
    return MeanAndDeviation(float(np.mean(values)), float(np.std(values)))


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of MMD² (equation 4 of the paper) of x (m, D) and y (n, D), float64."""
    m, n = len(x), len(y)
    within_x, within_y, across = _cubic_kernel(x, x), _cubic_kernel(y, y), _cubic_kernel(x, y)
    sum_x = (within_x.sum() - np.trace(within_x)) / (m * (m - 1))
    sum_y = (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(sum_x + sum_y - 2.0 * across.mean())


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


# ---- PRDC ----


class PRDC(NamedTuple):
    """All from 0 to 1, except for density, which exceeds 1 if samples concentrate in dense regions of real images."""

    precision: float  # fraction of samples inside a ball around a real image
    recall: float  # fraction of real images inside a ball around a sample
    density: float  # mean number of real balls around a sample, divided by k
    coverage: float  # fraction of real images with a sample inside their ball


def prdc(samples: np.ndarray, reference: np.ndarray) -> PRDC:
    """Precision, recall, density and coverage of samples among real images.

    A set is represented by balls around its points, whose radius is the distance to the k-th nearest neighbour in the
    set. Improved precision and recall: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2,
    k = 3. Density and coverage: Naeem et al., arXiv 2002.09797, equations 3 and 4, k = 5.

    Args:
        samples, reference: features (N, D) and (M, D), any real dtype; computed in float64, block by block. A point on
            the surface of a ball is inside, up to rounding.

    Raises:
        UserError: the features are no finite matrices of one dimension, or no more than k.
        ArithmeticError: distances overflow.
    """
    samples, reference = _check_pair(samples, reference)
    fewest = min(len(samples), len(reference))
    if fewest <= DENSITY_NEIGHBOURS:
        raise UserError(f"samples and real images must be more than {DENSITY_NEIGHBOURS} each, got {fewest}")
    # Translation leaves distances unchanged, and x² + y² − 2xy loses fewest digits near the origin.
    centre = reference.mean(axis=0, dtype=np.float64)
    samples, reference = samples - centre, reference - centre
    with np.errstate(over="ignore"):
        if not np.isfinite([np.square(x).sum(axis=1).max() for x in (samples, reference)]).all():
            raise ArithmeticError("distances of these features are beyond double precision; they are too large")

    sample_radii = neighbour_radii(samples, (PRECISION_NEIGHBOURS,))[0]
    ball_radii, density_radii = neighbour_radii(reference, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    in_real_balls, real_balls_entered = 0, 0
    real_in_ball = np.zeros(len(reference), dtype=bool)
    covered = np.zeros(len(reference), dtype=bool)
    for rows, distances in distance_blocks(samples, reference):
        in_real_balls += int((distances <= ball_radii).any(axis=1).sum())
        real_in_ball |= (distances <= sample_radii[rows, None]).any(axis=0)
        inside = distances <= density_radii
        real_balls_entered += int(inside.sum())
        covered |= inside.any(axis=0)
    return PRDC(
        precision=in_real_balls / len(samples),
        recall=float(real_in_ball.mean()),
        density=real_balls_entered / (DENSITY_NEIGHBOURS * len(samples)),
        coverage=float(covered.mean()),
    )


def neighbour_radii(points: np.ndarray, neighbours: tuple[int, ...]) -> np.ndarray:
    """Squared distance of each point (N, D) to its k-th nearest other one, for every k given: (len(neighbours), N)."""
    radii = np.empty((len(neighbours), len(points)))
    for rows, distances in distance_blocks(points, points):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = -1.0  # sort the point itself first
        radii[:, rows] = np.partition(distances, neighbours, axis=1)[:, neighbours].T
    return radii


def distance_blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of rows of x (N, D) with their squared Euclidean distances (n, M) to y (M, D), float64."""
    x_norms, y_norms = (np.einsum("nd,nd->n", points, points) for points in (x, y))
    size = max(BLOCK_ENTRIES // len(y), 1)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        distances = x[rows] @ y.T
        distances *= -2.0
        distances += x_norms[rows, None]
        distances += y_norms
        yield rows, np.maximum(distances, 0.0, out=distances)


# ---- Inception score ----


def inception_score(probabilities: np.ndarray, *, seed: int = 0) -> MeanAndDeviation:
    """exp(E_x KL(p(y|x) ‖ p(y))), p(y) being the mean of p(y|x) (Salimans et al., arXiv 1606.03498, section 4).

    Between 1 and the number of classes; high if images are classified with confidence and into many classes. Computed
    over ten equal parts, which are random since samples may be sorted by class.

    Args:
        probabilities: p(y|x) (N, classes), any real dtype; computed in float64.
        seed: of the parts.

    Raises:
        UserError: these are no probabilities, or fewer than the parts.
    """
    probabilities = _check_matrix(probabilities, "class probabilities", "classes")
    lowest, sums = probabilities.min(initial=0.0), probabilities.sum(axis=1, dtype=np.float64)
    if lowest < 0 or (np.abs(sums - 1) > SUM_ROUNDING).any():
        raise UserError(
            "class probabilities must be from 0 to 1 with sums of 1, as after a softmax, got a minimum of "
            f"{lowest:.3g} and sums from {sums.min():.3g} to {sums.max():.3g}"
        )
    if len(probabilities) < SPLITS:
        raise UserError(f"samples must be at least {SPLITS}, one for each part of them, got {len(probabilities)}")
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, SPLITS):
        conditional = probabilities[part].astype(np.float64)
        divergences = require("scipy.special").rel_entr(conditional, conditional.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return MeanAndDeviation(float(np.mean(scores)), float(np.std(scores)))
