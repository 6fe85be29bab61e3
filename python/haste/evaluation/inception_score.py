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


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts."""

    mean: float
    deviation: float


def inception_score(probabilities: np.ndarray, *, seed: int = 0) -> InceptionScore:
    """The score of class probabilities p(y|x) (N, classes), any real dtype, computed in float64.

    The parts are random: samples drawn class after class would otherwise fall into parts of few classes each. Raises
    UserError for fewer samples than parts.
    """
    if len(probabilities) < SPLITS:
        raise UserError(f"{len(probabilities)} samples are too few; it is taken over {SPLITS} parts of them")
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(order, SPLITS):
        conditional = probabilities[part].astype(np.float64)
        divergences = rel_entr(conditional, conditional.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
