"""Precision, recall, density and coverage: how samples lie among real pictures, by balls around their neighbours.

A set of features stands for the union of balls around its points, each as large as the distance to the point's k-th
nearest neighbour in the set. Improved precision and recall: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2,
k = 3. Density and coverage: Naeem et al., arXiv 2002.09797, equations 3 and 4, k = 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from haste.errors import UserError
from haste.evaluation.frechet import check_features

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
BLOCK_ENTRIES = 2**24  # distances that are held at once: 128 MiB in double precision


@dataclass(frozen=True)
class ManifoldScores:
    """All from 0 to 1, but density, which exceeds 1 where samples gather in the densest places of the real set."""

    precision: float  # share of the samples that lie in a ball around a real picture
    recall: float  # share of the real pictures that lie in a ball around a sample
    density: float  # real balls that a sample lies in, on average, over k
    coverage: float  # share of the real pictures whose ball holds a sample


def manifold_scores(samples: np.ndarray, reference: np.ndarray) -> ManifoldScores:
    """The four scores of samples (N, D) against reference (M, D), any real dtype, computed in float64.

    A point on the surface of a ball is inside, but for rounding. Distances are computed and forgotten block by block.
    Raises UserError for features that are no finite matrix, sets of other dimensions, or with no more points than
    neighbours, and ArithmeticError where distances are beyond double precision.
    """
    samples, reference = check_features(samples), check_features(reference)
    if samples.shape[1] != reference.shape[1]:
        raise UserError(
            f"features have {samples.shape[1]} and {reference.shape[1]} dimensions; both sides need the same network"
        )
    fewest = min(len(samples), len(reference))
    if fewest <= DENSITY_NEIGHBOURS:
        raise UserError(f"{fewest} pictures are too few; it takes more than {DENSITY_NEIGHBOURS} on either side")
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
    return ManifoldScores(
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
