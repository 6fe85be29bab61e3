"""The one path from images to scores: features of one network, one reference, and every metric or why it has no value.

`evaluate` is the whole of it; an `Evaluator` scores any number of sets against one reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from haste.data.images import ImageArray, ImageFiles, ImageSet, NpzImages, open_images
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.features import Extractor, Features, extract, load_extractor
from haste.evaluation.metrics import (
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
from haste.evaluation.reference import STORED, Reference, load_reference, stored_features, stored_reference
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import LoadedCheckpoint, Sampler, choose_labels, load_checkpoint
from haste.generation.sample_dir import RECORD, measure_full_steps, read_record
from haste.tables import NONE, format_number, known_columns, text_table

logger = logging.getLogger(__name__)

ADVISED_FOR_PRDC = 1000
ADVISED_FOR_INCEPTION_SCORE = 5000


NAMES = {
    "fd": "FD",
    "kid": "KID",
    "precision": f"precision (k = {PRECISION_NEIGHBOURS})",
    "recall": f"recall (k = {PRECISION_NEIGHBOURS})",
    "density": f"density (k = {DENSITY_NEIGHBOURS})",
    "coverage": f"coverage (k = {DENSITY_NEIGHBOURS})",
    "inception_score": "Inception score",
    "label_accuracy": "label accuracy",
}
DIGITS_SHOWN = {"kid": 5}  # behind the point; of others 3


@dataclass(frozen=True)
class Result:
    """One metric of one set of samples.

    key: of NAMES.
    value: None where it cannot be had.
    spread: standard deviation over subsets or parts.
    note: a caution, or why there is no value.
    """

    key: str
    value: float | None
    spread: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """'12.340', '0.01230 ± 0.00210' or '81.2%'; a dash for what cannot be had."""
        if self.key == "label_accuracy" and self.value is not None:
            return f"{self.value:.1%}"
        return format_number(self.value, DIGITS_SHOWN.get(self.key, 3), spread=self.spread)


@dataclass(frozen=True)
class Evaluation:
    """The results of one set of samples, and everything that they depend on, as plain values."""

    results: list[Result]
    settings: dict[str, Any]

    def __getitem__(self, key: str) -> Result:
        return next(result for result in self.results if result.key == key)

    def record(self) -> dict[str, Any]:
        """The results by their keys, for JSON: value, and spread and note where there are any."""
        return {
            result.key: {
                name: value
                for name, value in asdict(result).items()
                if name == "value" or (name != "key" and value is not None)
            }
            for result in self.results
        }

    def heading(self) -> str:
        """What was compared with what, in which features."""
        settings = self.settings
        count = settings["reference_count"]
        real = "statistics of real images" if count is None else f"{count:,} real images"
        return (
            f"{settings['samples']}: {settings['count']:,} samples against {real} ({settings['reference']}), "
            f"{settings['dimension']:,} features of {settings['network']}"
        )

    def __str__(self) -> str:
        """A row for each metric, then each caution and each reason once."""
        table = text_table([(NAMES[result.key], str(result)) for result in self.results], "<<")
        return "\n".join([table, *remarks(self.results)])


def remarks(results: Sequence[Result]) -> list[str]:
    """Sentences below a table; metrics that share one have it once."""
    lines: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            lines.setdefault(result.note, []).append(
                "" if result.value is not None else NAMES[result.key].split(" (")[0]
            )
    return [f"No {', '.join(names)}: {note}." if any(names) else note for note, names in lines.items()]


def checkpoints_text(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One row per checkpoint, one column per metric that any of them has, then the remarks."""
    keys = [result.key for result in rows[0][1]]
    cells = []
    for name, results in rows:
        by_key = {result.key: str(result) for result in results}
        cells.append([name, *(by_key.get(key, NONE) for key in keys)])
    table = text_table(known_columns(["step", *(NAMES[key] for key in keys)], cells), ">")
    return "\n".join([table, *dict.fromkeys(line for _, results in rows for line in remarks(results))])


@dataclass(frozen=True)
class MetricConfig:
    """What decides numbers beside the images: the subsets of KID, and the seed of all subsets."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0


def evaluate(
    samples: np.ndarray | Path | str | LoadedCheckpoint,
    features: str,
    reference: str,
    *,
    labels: np.ndarray | None = None,
    sampling: SamplingConfig | None = None,
    metrics: Collection[str] = tuple(NAMES),
    num_images: int | None = None,
    config: MetricConfig = MetricConfig(),
    batch_size: int = 128,
    classifier_dir: Path | str = "classifier",
) -> Evaluation:
    """Score images, or those that a model samples, against a reference.

    Args:
        samples: images (N, H, W, 3) uint8; or a folder, .zip or .npz of images; or a checkpoint, of which images are
            sampled, also by its path or that of its run; with features "stored", a file or folder of features.
        features: "inception:PATH", the name or folder of a vision encoder, "digits", or "stored".
        reference: a folder, .zip or .npz of images or of statistics, or the name of a data set ("digits").
        labels: (N,), what each image should show; of a sample folder, an .npz and a checkpoint they are known.
        sampling: how a checkpoint samples; None for 50 Euler steps with labels in turn.
        metrics: keys of NAMES. FD and Inception score, KID, precision, recall, density and coverage: see `metrics`.
        num_images: of a folder or file the first ones, all by default; of a checkpoint 1,000 by default.
        config: the subsets of KID and all seeds.
        batch_size: images in the network at once.
        classifier_dir: where the classifier of the digits is kept.

    Returns:
        A result for each metric; one that cannot be had has no value, and the reason as its note.

    Raises:
        UserError: what is given does not exist, or does not go together.
    """
    if isinstance(samples, np.ndarray) and (
        samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[-1] != 3 or not samples.size
    ):
        raise UserError(f"samples must be images (N, H, W, 3) uint8, got {samples.dtype} {samples.shape}")
    evaluator = Evaluator.load(features, reference, Path(classifier_dir), batch_size, config)
    if isinstance(samples, (str, Path)) and features != STORED and is_checkpoint(Path(samples)):
        samples = load_checkpoint(Path(samples))
    if isinstance(samples, LoadedCheckpoint):
        sampler = open_sampler(samples, sampling or SamplingConfig(labels="balanced"))
        images, labels = sample_images(sampler, num_images or 1000, batch_size)
        return evaluator.of_images(ImageArray(images), samples.checkpoint.name, labels, metrics)
    if isinstance(samples, np.ndarray):
        return evaluator.of_images(ImageArray(samples), "images", labels, metrics)
    return evaluator.of_samples(Path(samples), num_images, metrics, labels)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's, or a run's folder, and not one of images."""
    return path.suffix in (".pt", ".pth", ".safetensors") or (path / "checkpoints").is_dir()


class Evaluator:
    """Scores samples in the features of one network against one reference.

    extractor: None where features are stored.
    """

    def __init__(
        self,
        extractor: Extractor | None,
        reference: Reference,
        config: MetricConfig = MetricConfig(),
        batch_size: int = 128,
    ) -> None:
        self.extractor = extractor
        self.reference = reference
        self.config = config
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        features: str,
        reference: str,
        classifier_dir: Path,
        batch_size: int = 128,
        config: MetricConfig = MetricConfig(),
        samples: int | None = None,
    ) -> Evaluator:
        """By names, as --features and --reference take them; the reference is read under a progress bar.

        samples: how many will be scored. Too few for an FD are refused before the reference, which may take hours.
        Raises UserError for what does not exist or does not go together.
        """
        if features == STORED:
            return cls(None, stored_reference(reference), config, batch_size)
        extractor = load_extractor(features, classifier_dir)
        if samples is not None and (caution := check_sample_size(samples, extractor.dimension)):
            print(caution)
        with image_bar("reference") as advance:
            return cls(extractor, load_reference(reference, extractor, batch_size, advance), config, batch_size)

    @property
    def key(self) -> str:
        """What must be equal for two scores to be compared."""
        return f"{self.extractor.key if self.extractor else STORED} against {self.reference.name}"

    @property
    def knows_labels(self) -> bool:
        """Whether the network's classes are those of the data, so that there is a label accuracy."""
        return self.extractor is not None and self.extractor.classes is not None

    @cached_property
    def split_half_fd(self) -> float:
        """FD between two random halves of the reference, for scale. It is not a lower bound: halves are smaller sets
        than those that are scored, and the FD of small sets is biased upwards."""
        return split_half_fd(self.reference.features)

    def score(
        self, features: Features, labels: np.ndarray | None = None, metrics: Collection[str] = tuple(NAMES)
    ) -> list[Result]:
        """Every metric asked for, in the order of NAMES; the label accuracy only where there are labels to read.

        Raises UserError for a metric of no such name, and if the two sides have features of other dimensions.
        """
        reference, config = self.reference, self.config
        unknown = set(metrics) - set(NAMES)
        if unknown:
            raise UserError(f"metrics must be some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
        if labels is not None and np.shape(labels) != (len(features),):
            raise UserError(f"labels must be ({len(features)},), one for each image, got {np.shape(labels)}")
        if features.dimension != reference.dimension:
            raise UserError(
                f"samples have {features.dimension} features and the reference {reference.name} has "
                f"{reference.dimension}; both sides need the same network"
            )
        results = [
            *_attempt(["fd"], metrics, lambda: _fd(features, reference)),
            *_attempt(["kid"], metrics, lambda: _kid(features, reference, config)),
            *_attempt(["precision", "recall", "density", "coverage"], metrics, lambda: _prdc(features, reference)),
            *_attempt(["inception_score"], metrics, lambda: _inception_score(features, config)),
        ]
        if labels is not None and self.knows_labels and "label_accuracy" in metrics:
            results.append(Result("label_accuracy", float(np.mean(features.predictions == labels))))
        return results

    def values(self, features: Features, labels: np.ndarray, metrics: Sequence[str]) -> dict[str, float | None]:
        """The same as numbers by key, None for a label accuracy that this network does not give.

        Raises UserError for another one that cannot be had.
        """
        results = self.score(features, labels, metrics)
        for result in results:
            if result.value is None:
                raise UserError(result.note)
        return {**dict.fromkeys(metrics), **{result.key: result.value for result in results}}

    def of_samples(
        self,
        samples: Path,
        count: int | None = None,
        metrics: Collection[str] = tuple(NAMES),
        labels: np.ndarray | None = None,
    ) -> Evaluation:
        """Score a folder or a file of images, all or the first `count`, or of features that are stored."""
        if self.extractor is None:
            features = stored_features(samples, "--samples")
            identity = {"samples": samples.name, "features": STORED, "network": "stored features"}
            return self._evaluation(features, labels, metrics, identity)
        images = open_images(samples, "--samples", count)
        if images.are_jpeg and not self.reference.of_jpeg:
            logger.warning(
                "%s holds JPEG files, and the reference is of none: what JPEG loses counts as a difference between "
                "them; samples must be PNG to be compared", samples
            )  # fmt: skip
        if labels is None and self.knows_labels:
            labels = known_labels(samples, images, self.extractor.classes)
        cache = beside(samples, "features")
        return self.of_images(
            images, samples.name, labels, metrics, cache if os.access(cache.parent, os.W_OK) else None
        )

    def of_images(
        self,
        images: ImageSet,
        name: str,
        labels: np.ndarray | None = None,
        metrics: Collection[str] = tuple(NAMES),
        cache: Path | None = None,
    ) -> Evaluation:
        """Score a set of images under a progress bar. cache: the folder that keeps their features."""
        if self.extractor is None:
            raise UserError("--features is stored, so features must be given as --samples, not images")
        with image_bar("samples") as advance:
            features = extract(self.extractor, images, self.batch_size, lambda done: advance(done, len(images)), cache)
        extractor = self.extractor
        identity = {"digest": images.digest(), "features": extractor.key, "network": extractor.describe()}
        return self._evaluation(features, labels, metrics, {"samples": name, **identity})

    def _evaluation(
        self, features: Features, labels: np.ndarray | None, metrics: Collection[str], identity: dict[str, Any]
    ) -> Evaluation:
        settings = {
            **identity,
            "count": len(features),
            "dimension": features.dimension,
            "reference": self.reference.name,
            "reference_count": self.reference.count,
            **asdict(self.config),
        }
        return Evaluation(self.score(features, labels, metrics), settings)

    def describe_reference(self) -> str:
        """What to make of scores by a classifier of the data."""
        return (
            f"FD to {self.reference.count:,} real {self.reference.name} in {self.reference.dimension} features of "
            f"{self.extractor.describe()}; two halves of these are {self.split_half_fd:.2f} apart.\n"
            f"It reads {self.extractor.held_out_accuracy:.1%} of the real ones that it has not seen."
        )


def open_sampler(loaded: LoadedCheckpoint, sampling: SamplingConfig) -> Sampler:
    """A sampler whose full steps are, as those of `haste sample`, the same for all images."""
    sampler = Sampler(loaded, sampling)
    return sampler.with_full_steps(measure_full_steps(sampler)) if sampling.error_threshold else sampler


def sample_images(
    sampler: Sampler, count: int, batch_size: int, progress: Callable[[int], None] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, H, W, 3) uint8 and labels (count,) of the numbers below `count`, in batches."""
    batches = []
    for start in range(0, count, batch_size):
        batches.append(sampler.sample(range(start, min(start + batch_size, count))))
        progress(len(batches[-1][1]))
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return images, labels


def known_labels(samples: Path, images: ImageFiles | NpzImages, classes: int) -> np.ndarray | None:
    """What each image should show (N,): from the .npz, or from the sample folder's record. None if nobody knows."""
    if isinstance(images, NpzImages):
        labels = images.labels
        if labels is not None and labels.shape != (len(images),):
            raise UserError(f"labels in {samples} have shape {labels.shape}; they must be ({len(images)},)")
        return labels
    numbers = images.numbers()
    if numbers is None or not (samples / RECORD).is_file():
        return None
    settings = read_record(samples).settings
    return choose_labels(settings["labels"], settings["global_seed"], numbers, classes)


def beside(samples: Path, ending: str) -> Path:
    """<samples>-<ending>: the same for a folder and for the .npz of its images."""
    samples = samples if samples.name not in ("", "..") else samples.resolve()
    name = samples.name if samples.is_dir() else samples.stem
    return samples.with_name(f"{name}-{ending}")


@contextmanager
def image_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first images; it is advanced by images that are done, of a total."""
    bars: list[Any] = []

    def advance(images: int, of: int) -> None:
        if not bars:
            bars.append(progress_bar(total=of, unit="image", desc=name))
        bars[0].update(images)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()


# ---- the metrics, with their cautions ----


def _attempt(keys: list[str], metrics: Collection[str], compute: Callable[[], list[Result]]) -> list[Result]:
    """What `compute` returns, or the sentence with which it refused, for each of its metrics that is asked for."""
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


def _kid(samples: Features, reference: Reference, config: MetricConfig) -> list[Result]:
    subsets = {"subsets": config.kid_subsets, "subset_size": config.kid_subset_size, "seed": config.seed}
    return [Result("kid", *kid(samples.values, _features_of(reference), **subsets))]


def _prdc(samples: Features, reference: Reference) -> list[Result]:
    scores = prdc(samples.values, _features_of(reference))
    fewest = min(len(samples), len(reference.features))
    note = None
    if fewest < ADVISED_FOR_PRDC:
        note = (
            f"Precision, recall, density and coverage rest on {fewest:,} images, whose neighbours are far apart; "
            f"use at least {ADVISED_FOR_PRDC:,} on either side."
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


def _features_of(reference: Reference) -> np.ndarray:
    if reference.features is None:
        raise UserError("of the reference only mean and covariance are stored, which allow the FD alone")
    return reference.features
