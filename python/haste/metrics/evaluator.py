"""From features to metrics: each metric of a set of images against a reference, or the reason why it has no value."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from haste.data.images import ImageSet
from haste.errors import UserError
from haste.metrics.config import STORED, MetricConfig
from haste.metrics.features import Extractor, Features, extract, feature_dimension, load_extractor
from haste.metrics.formulas import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    check_sample_size,
    fit_gaussian,
    frechet_distance,
    inception_score,
    kid,
    prdc,
    split_half_fd,
)
from haste.metrics.reference import Reference, load_reference, stored_reference
from haste.tables import format_number, text_table

logger = logging.getLogger(__name__)

ADVISED_FOR_PRDC, ADVISED_FOR_INCEPTION_SCORE = 1000, 5000  # images

NAMES = {
    "fd": "FD",
    "sfid": "sFID",
    "kid": "KID",
    "precision": f"precision (k = {PRECISION_NEIGHBOURS})",
    "recall": f"recall (k = {PRECISION_NEIGHBOURS})",
    "density": f"density (k = {DENSITY_NEIGHBOURS})",
    "coverage": f"coverage (k = {DENSITY_NEIGHBOURS})",
    "inception_score": "Inception score",
    "label_accuracy": "label accuracy",
}
# Of all results; the last two are of a network of its own, and of several.
TITLES = {**NAMES, "clip_score": "CLIP score", "fdr": "FDr"}


@dataclass(frozen=True)
class Result:
    """One metric of one set of samples.

    Attributes:
        key: a key of TITLES.
        value: None where the metric could not be computed.
        spread: standard deviation over subsets or parts.
        note: a caution, or why there is no value.
    """

    key: str
    value: float | None
    spread: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """'12.340', '0.01230 ± 0.00210' or '81.2%'; a dash without a value."""
        if self.key == "label_accuracy" and self.value is not None:
            return f"{self.value:.1%}"
        return format_number(self.value, 5 if self.key == "kid" else 3, spread=self.spread)


@dataclass(frozen=True)
class Evaluation:
    """The results of one set of samples, and the settings that they depend on, as plain values.

    Attributes:
        caution: what makes all results doubtful, if anything does; it has been logged.
    """

    results: list[Result]
    settings: dict[str, Any]
    caution: str | None = None

    def __getitem__(self, key: str) -> Result:
        return next(result for result in self.results if result.key == key)

    def record(self) -> dict[str, Any]:
        """The results by key, for JSON: value, and spread and note where there are any."""
        return {
            result.key: {
                "value": result.value,
                **{name: value for name in ("spread", "note") if (value := getattr(result, name)) is not None},
            }
            for result in self.results
        }

    def heading(self) -> str:
        """One line: which samples, against which reference, in which features."""
        settings = self.settings
        if "reference" not in settings:
            return f"{settings['samples']}: {settings['count']:,} samples with captions, by {settings['network']}"
        count = settings["reference_count"]
        real = "statistics of real images" if count is None else f"{count:,} real images"
        return (
            f"{settings['samples']}: {settings['count']:,} samples against {real} ({settings['reference']}), "
            f"{settings['dimension']:,} features of {settings['network']}"
        )

    def __str__(self) -> str:
        """A row for each metric, then the notes."""
        rows = [(TITLES[result.key], str(result)) for result in self.results]
        return "\n".join([text_table(rows, "<<"), *notes(self.results)])


def notes(results: Sequence[Result]) -> list[str]:
    """The notes of results as sentences, each once."""
    missing: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            names = missing.setdefault(result.note, [])
            names += [TITLES[result.key].split(" (")[0]] if result.value is None else []
    return [f"No {', '.join(names)}: {note}." if names else note for note, names in missing.items()]


class Evaluator:
    """Scores any number of image sets in the features of one network (None: stored) against one reference."""

    def __init__(
        self,
        extractor: Extractor | None,
        reference: Reference,
        config: MetricConfig | None = None,
        batch_size: int = 128,
    ) -> None:
        self.extractor = extractor
        self.reference = reference
        self.config = config or MetricConfig()
        self.batch_size = batch_size
        self._logged: set[str] = set()

    @classmethod
    def load(
        cls,
        features: str,
        reference: str,
        classifier_dir: Path,
        batch_size: int = 128,
        config: MetricConfig | None = None,
        samples: int | None = None,
    ) -> Evaluator:
        """Load by the names of --features and --reference; first refuse too few --num-fid-samples for an FD."""
        if features == STORED:
            return cls(None, stored_reference(reference), config, batch_size)
        dimension = None if samples is None else feature_dimension(features)
        if samples and dimension:
            if samples <= dimension:
                raise UserError(
                    f"--num-fid-samples must be above {dimension}, the number of features, for an FD, got {samples}"
                )
            if caution := check_sample_size(samples, dimension):
                logger.warning(caution)
        extractor = load_extractor(features, classifier_dir)
        return cls(extractor, load_reference(reference, extractor, batch_size), config, batch_size)

    @property
    def key(self) -> str:
        """Names the network and the reference: only scores with the same key can be compared."""
        return f"{self.extractor.key if self.extractor else STORED} against {self.reference.name}"

    @property
    def classes(self) -> int | None:
        """The number of classes, if the network classifies the data's own classes: then there is a label accuracy."""
        return None if self.extractor is None else self.extractor.classes

    @cached_property
    def split_half_fd(self) -> float:
        """FD between two random halves of the reference, for scale; no lower bound, as small sets have a larger FD."""
        return split_half_fd(self.reference.require_features())

    def score(
        self, features: Features, labels: np.ndarray | None = None, metrics: Collection[str] = tuple(NAMES)
    ) -> list[Result]:
        """Compute metrics, in the order of NAMES; the label accuracy needs `classes`, and `labels` that are some of
        them. Raises UserError."""
        reference, config = self.reference, self.config
        unknown = set(metrics) - set(NAMES)
        if unknown:
            raise UserError(f"metrics must be some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
        if labels is not None and np.shape(labels) != (len(features),):
            raise UserError(f"labels must be ({len(features)},), one for each image, got {np.shape(labels)}")
        if features.dimension != reference.dimension:
            raise UserError(
                f"samples and the reference must have features of the same network, got {features.dimension} "
                f"dimensions for samples and {reference.dimension} for {reference.name}"
            )
        results = [
            *_attempt(["fd"], metrics, lambda: _fd(features, reference)),
            *([] if features.spatial is None else _attempt(["sfid"], metrics, lambda: _sfid(features, reference))),
            *_attempt(["kid"], metrics, lambda: _kid(features, reference, config)),
            *_attempt(["precision", "recall", "density", "coverage"], metrics, lambda: _prdc(features, reference)),
            *_attempt(["inception_score"], metrics, lambda: _inception_score(features, config)),
        ]
        classified = labels is not None and self.classes is not None and self._are_classes(labels)
        if classified and "label_accuracy" in metrics:  # images of no class have none
            results.append(Result("label_accuracy", float(np.mean(features.predictions == labels))))
        return results

    def _are_classes(self, labels: np.ndarray) -> bool:
        return bool(((labels >= 0) & (labels < self.classes)).any())

    def values(self, features: Features, labels: np.ndarray, metrics: Sequence[str]) -> dict[str, float | None]:
        """The values of metrics by key; None for a label accuracy that the network cannot compute, else UserError."""
        values: dict[str, float | None] = dict.fromkeys(metrics)
        for result in self.score(features, labels, metrics):
            if result.value is None:
                raise UserError(result.note)
            values[result.key] = result.value
        return values

    def of_images(
        self,
        images: ImageSet,
        name: str,
        labels: np.ndarray | None = None,
        metrics: Collection[str] = tuple(NAMES),
        cache: Path | None = None,
    ) -> Evaluation:
        """Score a set of images under a progress bar. cache: the folder that keeps their features."""
        extractor = self.extractor
        if extractor is None:
            raise UserError("samples must be features with --features stored, got images")
        caution = caution_of_compression(name, images.lossy, self.reference)
        if caution and caution not in self._logged:
            logger.warning("%s", caution)
            self._logged.add(caution)
        features = extract(extractor, images, self.batch_size, cache, title="samples")
        identity = {"digest": images.digest(), "features": extractor.key, "network": extractor.describe()}
        return replace(self.of_features(features, labels, metrics, {"samples": name, **identity}), caution=caution)

    def of_features(
        self, features: Features, labels: np.ndarray | None, metrics: Collection[str], identity: dict[str, Any]
    ) -> Evaluation:
        """Score features; `identity` says whose they are."""
        settings = {
            **identity,
            "count": len(features),
            "dimension": features.dimension,
            "reference": self.reference.name,
            "reference_count": self.reference.count,
            **asdict(self.config),
        }
        return Evaluation(self.score(features, labels, metrics), settings)


# ---- the metrics, with their cautions ----


def caution_of_compression(name: str, lossy: bool | None, reference: Reference) -> str | None:
    """A caution if either samples or the reference alone were compressed with loss, as far as is known: artefacts then
    count as a difference between them (Parmar et al., arXiv 2104.11222, section 4)."""
    if lossy is None or reference.lossy is None or lossy == reference.lossy:
        return None
    first, second = (name, "the reference") if lossy else ("the reference", name)
    return (f"{first} was compressed with loss, as JPEG, and {second} was not: artefacts count as a difference between "
            "them, and scores cannot be compared with others")  # fmt: skip


def _attempt(keys: list[str], metrics: Collection[str], compute: Callable[[], list[Result]]) -> list[Result]:
    """The results of `compute` that are wanted; if it fails, its error is the note of each."""
    wanted = [key for key in keys if key in metrics]
    if not wanted:
        return []
    try:
        return [result for result in compute() if result.key in wanted]
    except (UserError, ArithmeticError) as error:
        return [Result(key, None, note=str(error)) for key in wanted]


def _fd(samples: Features, reference: Reference) -> list[Result]:
    distance = frechet_distance(fit_gaussian(samples.values), reference.gaussian)
    cautions = [check_sample_size(*samples.values.shape)]
    if reference.count is not None:
        cautions.append(check_sample_size(reference.count, samples.dimension, "real images"))
    return [Result("fd", distance, note=" ".join(filter(None, cautions)) or None)]


def _sfid(samples: Features, reference: Reference) -> list[Result]:
    """It has as good as FID's number of dimensions, so that FID's cautions are its own."""
    if reference.spatial is None:
        raise UserError(reference.no_spatial)
    assert samples.spatial is not None  # as checked
    return [Result("sfid", frechet_distance(fit_gaussian(samples.spatial), reference.spatial))]


def _kid(samples: Features, reference: Reference, config: MetricConfig) -> list[Result]:
    subsets = {"subsets": config.kid_subsets, "subset_size": config.kid_subset_size, "seed": config.seed}
    return [Result("kid", *kid(samples.values, reference.require_features(), **subsets))]


def _prdc(samples: Features, reference: Reference) -> list[Result]:
    real = reference.require_features()
    scores = prdc(samples.values, real)
    fewest = min(len(samples), len(real))
    note = None
    if fewest < ADVISED_FOR_PRDC:
        note = (
            f"Precision, recall, density and coverage rest on {fewest:,} images, whose neighbours are far apart; "
            f"use at least {ADVISED_FOR_PRDC:,} samples and real images."
        )
    return [Result(key, value, note=note) for key, value in scores._asdict().items()]


def _inception_score(samples: Features, config: MetricConfig) -> list[Result]:
    if samples.probabilities is None:
        raise UserError("these features come without class probabilities")
    note = None
    if len(samples) < ADVISED_FOR_INCEPTION_SCORE:
        note = (
            f"The Inception score rests on {len(samples):,} samples and is biased downwards; "
            f"use at least {ADVISED_FOR_INCEPTION_SCORE:,}."
        )
    return [Result("inception_score", *inception_score(samples.probabilities, seed=config.seed), note)]
