"""FD, KID, PRDC and Inception score of features and class probabilities, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from haste.errors import UserError, require

# ‖root·root − matrix‖ / ‖matrix‖ of a healthy decomposition is about 1e-15 times the dimension.
ROOT_TOLERANCE = 1e-8

# What a covariance may fall short of symmetry, or of having no negative eigenvalue, by its rounding to single precision
# (6e-8 of an entry, times the root of some thousand dimensions): relative to its largest entry or eigenvalue.
ROUNDING = 1e-5

BLOCK = 4096  # feature vectors that are converted to double precision at once
BLOCK_ENTRIES = 2**24  # distances that are held at once: 128 MiB in double precision

# Below this many samples per feature dimension the estimated covariance is too noisy to compare small FDs.
ADVISED_SAMPLES_PER_DIMENSION = 10

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
SPLITS = 10  # of the Inception score
SUM_ROUNDING = 1e-2  # by which probabilities may miss a sum of 1: those of bfloat16
HALVES_SEED = 271828


class MeanAndDeviation(NamedTuple):
    """A score's mean and standard deviation over random subsets or parts."""

    mean: float
    deviation: float


def _check_matrix(matrix: np.ndarray, what: str, columns: str) -> np.ndarray:
    """As an array, if it is a matrix (samples, columns) of finite real numbers; UserError if not."""
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.dtype.kind not in "iuf":
        raise UserError(f"{what} must be a matrix of numbers (samples, {columns}), got {matrix.dtype} {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise UserError(f"{what} hold values that are not finite; the samples or the network are broken")
    return matrix


def _check_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of both sides; UserError if they are none, or of other dimensions."""
    a, b = (_check_matrix(features, "features", "dimension") for features in (a, b))
    _check_dimensions(a.shape[1], b.shape[1])
    return a, b


def _check_dimensions(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features have {a} and {b} dimensions; both sides need the same network")


# ---- FD ----


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
    """Mean and unbiased covariance of features.

    Args:
        features: (N, D), any real dtype; computed in float64.
        what: what they are of, for messages.

    Raises:
        UserError: the features are no matrix, not finite, too few, or so large that their squares are beyond double
            precision.
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
        raise UserError(f"features are as large as {largest:.1e}, whose squares are beyond double precision")
    return Gaussian(mean, scatter / (count - 1), count)


def check_sample_size(count: int, dimension: int, what: str = "samples") -> str | None:
    """One sentence of caution if `count` samples make the FD noisy in `dimension` dimensions, else None.

    Raises UserError if they are no more than the dimensions: the covariance is then singular, and the FD would measure
    the sample size.
    """
    advised = ADVISED_SAMPLES_PER_DIMENSION * dimension
    if count <= dimension:
        raise UserError(
            f"{count} {what} are too few for an FD in {dimension} feature dimensions; it needs more than {dimension}, "
            f"and {advised} are advised"
        )
    if count >= advised:
        return None
    return (
        f"The FD rests on {count} {what} in {dimension} feature dimensions and is biased upwards; "
        f"compare it only with FDs of as many {what}, or use at least {advised}."
    )


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


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """FD, the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6):

        d² = |μ_a − μ_b|² + tr(A) + tr(B) − 2·tr((A^½ B A^½)^½)

    FID in the features of FID's Inception, FD-DINOv2 in DINOv2's. The usual form takes the root of A·B, which is not
    symmetric, with a general Schur method whose answer has been silently wrong in some library versions. A^½ B A^½ is
    symmetric positive semi-definite and has the same eigenvalues, so two symmetric eigen-decompositions suffice.

    Returns:
        Never below 0.

    Raises:
        UserError: the dimensions differ.
        ArithmeticError: a matrix root fails its residual check, or the distance is beyond double precision.
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
    return max(distance, 0.0)  # equal Gaussians may come out at minus one rounding error


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semi-definite root of a symmetric positive semi-definite matrix (D, D), float64.

    Eigenvalues that are negative by rounding alone (ROUNDING) count as 0. Raises ArithmeticError if the square of the
    root is not the matrix again, which is also what happens when one is further below 0.
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

    For equal distributions it is 0 on average, at any number of samples, and may come out below 0. As in the paper it
    is averaged over random subsets, each without replacement.

    Args:
        a, b: features (N, D) and (M, D), any real dtype; computed in float64.
        subsets, subset_size: three matrices (subset_size, subset_size) are held at a time.
        seed: of the subsets.

    Raises:
        UserError: the features are no finite matrices, of other dimensions, or fewer than a subset.
        ArithmeticError: the kernel is beyond double precision.
    """
    a, b = _check_pair(a, b)
    most = min(len(a), len(b))
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
    """All from 0 to 1, but density, which exceeds 1 where samples gather in the densest places of the real set."""

    precision: float  # share of the samples that lie in a ball around a real image
    recall: float  # share of the real images that lie in a ball around a sample
    density: float  # real balls that a sample lies in, on average, over k
    coverage: float  # share of the real images whose ball holds a sample


def prdc(samples: np.ndarray, reference: np.ndarray) -> PRDC:
    """Precision, recall, density, coverage: how samples lie among real images, by balls around nearest neighbours.

    A set stands for the union of balls around its points, each as large as the distance to the point's k-th nearest
    neighbour in the set. Improved precision and recall: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2,
    k = 3. Density and coverage: Naeem et al., arXiv 2002.09797, equations 3 and 4, k = 5.

    Args:
        samples, reference: features (N, D) and (M, D), any real dtype; computed in float64, block by block. A point on
            the surface of a ball is inside, but for rounding.

    Raises:
        UserError: the features are no finite matrices, of other dimensions, or no more than k.
        ArithmeticError: distances are beyond double precision.
    """
    samples, reference = _check_pair(samples, reference)
    fewest = min(len(samples), len(reference))
    if fewest <= DENSITY_NEIGHBOURS:
        raise UserError(f"{fewest} images are too few; it takes more than {DENSITY_NEIGHBOURS} on either side")
    # Distances do not change when all points move; near the origin x² + y² − 2xy loses fewest digits.
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
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = -1.0  # itself, and first in the order
        radii[:, rows] = np.partition(distances, neighbours, axis=1)[:, neighbours].T
    return radii


def distance_blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared Euclidean distances of x (N, D) to y (M, D), float64: some rows of x at a time, (n, M)."""
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

    Between 1 and the number of classes: are images clear of class, and of many classes? It is taken over ten equal
    parts. These are random: samples of class after class would otherwise fall into parts of few classes each.

    Args:
        probabilities: p(y|x) (N, classes), any real dtype; computed in float64.
        seed: of the parts.

    Raises:
        UserError: these are no probabilities, or fewer than parts.
    """
    probabilities = _check_matrix(probabilities, "class probabilities", "classes")
    lowest, sums = probabilities.min(initial=0.0), probabilities.sum(axis=1, dtype=np.float64)
    if lowest < 0 or (np.abs(sums - 1) > SUM_ROUNDING).any():
        raise UserError(
            f"class probabilities reach down to {lowest:.3g}, with sums from {sums.min():.3g} to {sums.max():.3g}; "
            "they must be from 0 to 1 with sums of 1, which logits become by a softmax"
        )
    if len(probabilities) < SPLITS:
        raise UserError(f"{len(probabilities)} samples are too few; it is taken over {SPLITS} parts of them")
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, SPLITS):
        conditional = probabilities[part].astype(np.float64)
        divergences = require("scipy.special").rel_entr(conditional, conditional.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return MeanAndDeviation(float(np.mean(scores)), float(np.std(scores)))
