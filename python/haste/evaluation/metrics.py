"""All metrics of one set of samples against one reference; one that cannot be had is listed with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from haste.errors import UserError
from haste.evaluation.features import Features
from haste.evaluation.frechet import check_sample_size, fit_gaussian, frechet_distance
from haste.evaluation.inception_score import inception_score
from haste.evaluation.kernel_distance import kernel_distance
from haste.evaluation.manifolds import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, manifold_scores
from haste.evaluation.reference import Reference

ADVISED_FOR_MANIFOLDS = 1000
ADVISED_FOR_INCEPTION_SCORE = 5000

NAMES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "precision": f"precision (k = {PRECISION_NEIGHBOURS})",
    "recall": f"recall (k = {PRECISION_NEIGHBOURS})",
    "density": f"density (k = {DENSITY_NEIGHBOURS})",
    "coverage": f"coverage (k = {DENSITY_NEIGHBOURS})",
    "inception_score": "Inception score",
    "label_accuracy": "label accuracy",
}


@dataclass(frozen=True)
class Result:
    """One metric. spread: standard deviation over subsets or parts. note: a caution, or why there is no value."""

    key: str
    value: float | None
    spread: float | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return NAMES[self.key]


@dataclass(frozen=True)
class MetricSettings:
    """What decides numbers beside the pictures: the subsets of the kernel distance, and the seed of all subsets."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0


def measure(
    samples: Features,
    reference: Reference,
    settings: MetricSettings = MetricSettings(),
    labels: np.ndarray | None = None,
) -> list[Result]:
    """Every metric, in the order of NAMES.

    labels: (N,), what each sample should show, if the network's classes are the same; else None, and there is no label
    accuracy. Raises UserError if the two sides have features of other dimensions.
    """
    if samples.dimension != reference.dimension:
        raise UserError(f"samples have {samples.dimension} features and the reference {reference.name} has "
                        f"{reference.dimension}; both sides need the same network")  # fmt: skip
    return [
        *attempt(["frechet_distance"], lambda: frechet_results(samples, reference)),
        *attempt(["kernel_distance"], lambda: kernel_results(samples, reference, settings)),
        *attempt(["precision", "recall", "density", "coverage"], lambda: manifold_results(samples, reference)),
        *attempt(["inception_score"], lambda: inception_results(samples, settings)),
        *([] if labels is None else [Result("label_accuracy", accuracy(samples, labels))]),
    ]


def attempt(keys: list[str], compute: Callable[[], list[Result]]) -> list[Result]:
    """What `compute` returns, or the sentence with which it refused, for each of its metrics."""
    try:
        return compute()
    except (UserError, ArithmeticError) as error:
        return [Result(key, None, note=str(error)) for key in keys]


def frechet_results(samples: Features, reference: Reference) -> list[Result]:
    distance = frechet_distance(fit_gaussian(samples.values), reference.gaussian)
    cautions = [check_sample_size(*samples.values.shape)]
    if reference.count is not None:
        cautions.append(check_sample_size(reference.count, samples.dimension, "real pictures"))
    return [Result("frechet_distance", distance, note=" ".join(filter(None, cautions)) or None)]


def kernel_results(samples: Features, reference: Reference, settings: MetricSettings) -> list[Result]:
    mean, deviation = kernel_distance(
        samples.values,
        features_of(reference),
        subsets=settings.kid_subsets,
        subset_size=settings.kid_subset_size,
        seed=settings.seed,
    )
    return [Result("kernel_distance", mean, deviation)]


def manifold_results(samples: Features, reference: Reference) -> list[Result]:
    scores = manifold_scores(samples.values, features_of(reference))
    fewest = min(len(samples), len(reference.features))
    note = None
    if fewest < ADVISED_FOR_MANIFOLDS:
        note = (
            f"Precision, recall, density and coverage rest on {fewest:,} pictures, whose neighbours are far apart; "
            f"use at least {ADVISED_FOR_MANIFOLDS:,} on either side."
        )
    return [Result(key, getattr(scores, key), note=note) for key in ("precision", "recall", "density", "coverage")]


def inception_results(samples: Features, settings: MetricSettings) -> list[Result]:
    if samples.probabilities is None:
        raise UserError("these features come without class probabilities")
    mean, deviation = inception_score(samples.probabilities, seed=settings.seed)
    note = None
    if len(samples) < ADVISED_FOR_INCEPTION_SCORE:
        note = (
            f"The Inception score rests on {len(samples):,} samples and is biased downwards; "
            f"use at least {ADVISED_FOR_INCEPTION_SCORE:,}."
        )
    return [Result("inception_score", mean, deviation, note)]


def accuracy(samples: Features, labels: np.ndarray) -> float:
    """The share of samples, 0 to 1, whose most probable class is their label."""
    return float(np.mean(samples.probabilities.argmax(axis=1) == labels))


def features_of(reference: Reference) -> np.ndarray:
    """(N, D); UserError if only statistics were stored."""
    if reference.features is None:
        raise UserError("of the reference only mean and covariance are stored, which allow the Fréchet distance alone")
    return reference.features
