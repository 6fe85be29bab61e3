"""Inception score (Salimans et al., arXiv 1606.03498, section 4): are pictures clear of class, and of many classes?

exp(E_x KL(p(y|x) ‖ p(y))), p(y) being the mean of p(y|x); between 1 and the number of classes. It is taken over ten
equal parts of the samples, whose standard deviation is given beside the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import rel_entr

from haste.errors import UserError

SPLITS = 10
ROUNDING = 1e-2  # by which probabilities may miss a sum of 1: those of bfloat16


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts."""

    mean: float
    deviation: float


def check_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """The probabilities as an array, if they are (samples, classes), from 0 to 1, with a sum of 1; UserError if not."""
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] == 0 or probabilities.dtype.kind not in "iuf":
        raise UserError(
            f"class probabilities are {probabilities.dtype} of shape {probabilities.shape}; they must be numbers "
            "(samples, classes)"
        )
    if not np.isfinite(probabilities).all():
        raise UserError("class probabilities hold values that are not finite; the samples or the network are broken")
    lowest, sums = probabilities.min(initial=0.0), probabilities.sum(axis=1, dtype=np.float64)
    if lowest < 0 or (np.abs(sums - 1) > ROUNDING).any():
        raise UserError(
            f"class probabilities reach down to {lowest:.3g}, with sums from {sums.min():.3g} to {sums.max():.3g}; "
            "they must be from 0 to 1 with sums of 1, which logits become by a softmax"
        )
    return probabilities


def inception_score(probabilities: np.ndarray, *, seed: int = 0) -> InceptionScore:
    """The score of class probabilities p(y|x) (N, classes), any real dtype, computed in float64.

    The parts are random: samples drawn class after class would otherwise fall into parts of few classes each. Raises
    UserError for fewer samples than parts, and for what are no probabilities.
    """
    probabilities = check_probabilities(probabilities)
    if len(probabilities) < SPLITS:
        raise UserError(f"{len(probabilities)} samples are too few; it is taken over {SPLITS} parts of them")
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, SPLITS):
        conditional = probabilities[part].astype(np.float64)
        divergences = rel_entr(conditional, conditional.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
