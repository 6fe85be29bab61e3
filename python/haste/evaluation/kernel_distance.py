"""Kernel distance between two sets of features (KID; Bińkowski et al., arXiv 1801.01401, section 4).

The squared maximum mean discrepancy under the cubic kernel k(x, y) = (x·y / D + 1)³, by its unbiased estimator: for
equal distributions it is 0 on average, at any number of samples, and may come out below 0. As in the paper it is
averaged over random subsets, whose standard deviation is given beside the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haste.errors import UserError
from haste.evaluation.frechet import check_features


class KernelDistance(NamedTuple):
    """Mean and standard deviation of MMD² over the subsets."""

    mean: float
    deviation: float


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """MMD² of features a (N, D) and b (M, D), any real dtype, computed in float64.

    Every subset is drawn without replacement from either side. Three matrices (subset_size, subset_size) are held at a
    time. Raises UserError for features that are no finite matrix, sets of other dimensions, or smaller than a subset,
    and ArithmeticError where the kernel is beyond double precision.
    """
    a, b = check_features(a), check_features(b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features have {a.shape[1]} and {b.shape[1]} dimensions; both sides need the same network")
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise UserError(
            f"--kid-subset-size is {subset_size:,}; it must be at least 2, and at most {min(len(a), len(b)):,}, the "
            "smaller number of pictures"
        )
    rng = np.random.default_rng(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        return features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)

    with np.errstate(over="ignore", invalid="ignore"):
        values = [unbiased_mmd2(subset(a), subset(b)) for _ in range(subsets)]
    if not np.isfinite(values).all():
        raise ArithmeticError("the kernel of these features is beyond double precision; they are too large")
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of MMD² (equation 4 of the paper) of x (m, D) and y (n, D), float64."""
    m, n = len(x), len(y)
    within_x, within_y, across = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
    sum_x = (within_x.sum() - np.trace(within_x)) / (m * (m - 1))
    sum_y = (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(sum_x + sum_y - 2.0 * across.mean())


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / D + 1)³ for every pair of x (m, D) and y (n, D): (m, n)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3
