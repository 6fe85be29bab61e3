"""All metrics of one set of samples against one reference; one that cannot be had is listed with its reason.

From sets of images on disk to all metrics: one network and one reference, for any number of sets.

What was measured of a set of samples, kept beside it as JSON with everything that it depends on.

    <samples>-evaluation.json   one entry for each combination of images, network, reference and settings
    <samples>-features/         features of the images, by network

Nothing is lost by measuring again: an entry is replaced by one of the same images and settings alone.

Scores of images and of runs: Fréchet distance to the real digits, and accuracy on the requested label.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from haste.digits.classifier import NUM_CLASSES, Classifier, ClassifierConfig, load_classifier, real_digits
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.features import DigitsExtractor, Extractor, Features, extract, load_extractor
from haste.evaluation.image_readers import ImageFiles, NpzImages, open_images
from haste.evaluation.metrics import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    Gaussian,
    check_sample_size,
    fit_gaussian,
    frechet_distance,
    inception_score,
    kid,
    prdc,
)
from haste.evaluation.reference import STORED, Reference, load_reference, stored_features, stored_reference
from haste.generation.checkpoint import LoadedCheckpoint, load_checkpoint
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler, choose_labels
from haste.generation.sample_dir import RECORD, measure_full_steps, read_record
from haste.io import read_json, write_json, write_text, writing
from haste.resumable import updating
from haste.training.checkpoint import as_before, checkpoint_identity
from haste.training.logging import finite, is_step, read_lines

logger = logging.getLogger(__name__)

ADVISED_FOR_MANIFOLDS = 1000
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
class MetricConfig:
    """What decides numbers beside the images: the subsets of the kernel distance, and the seed of all subsets."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0


def measure(
    samples: Features,
    reference: Reference,
    settings: MetricConfig = MetricConfig(),
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
        *attempt(["fd"], lambda: frechet_results(samples, reference)),
        *attempt(["kid"], lambda: kernel_results(samples, reference, settings)),
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
        cautions.append(check_sample_size(reference.count, samples.dimension, "real images"))
    return [Result("fd", distance, note=" ".join(filter(None, cautions)) or None)]


def kernel_results(samples: Features, reference: Reference, settings: MetricConfig) -> list[Result]:
    mean, deviation = kid(
        samples.values,
        features_of(reference),
        subsets=settings.kid_subsets,
        subset_size=settings.kid_subset_size,
        seed=settings.seed,
    )
    return [Result("kid", mean, deviation)]


def manifold_results(samples: Features, reference: Reference) -> list[Result]:
    scores = prdc(samples.values, features_of(reference))
    fewest = min(len(samples), len(reference.features))
    note = None
    if fewest < ADVISED_FOR_MANIFOLDS:
        note = (
            f"Precision, recall, density and coverage rest on {fewest:,} images, whose neighbours are far apart; "
            f"use at least {ADVISED_FOR_MANIFOLDS:,} on either side."
        )
    return [Result(key, getattr(scores, key), note=note) for key in ("precision", "recall", "density", "coverage")]


def inception_results(samples: Features, settings: MetricConfig) -> list[Result]:
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


@dataclass(frozen=True)
class Evaluation:
    """Results of one set of samples, and everything that they depend on, as plain values."""

    results: list[Result]
    settings: dict[str, Any]


class Evaluator:
    """Measures samples in the features of one network against one reference.

    features, reference: as --features and --reference name them. classifier_dir: where the digits' is kept.
    Raises UserError for what does not exist or does not go together.
    """

    def __init__(
        self, features: str, reference: str, classifier_dir: Path, batch_size: int, settings: MetricConfig
    ) -> None:
        self.batch_size = batch_size
        self.settings = settings
        self.extractor = None if features == STORED else load_extractor(features, classifier_dir)
        if self.extractor is None:
            self.reference = stored_reference(reference)
        else:
            self.reference = real_side(reference, self.extractor, batch_size)

    @property
    def on_digits(self) -> bool:
        """Whether the classifier of the digits compares with the real digits."""
        return isinstance(self.extractor, DigitsExtractor) and self.reference.name == "digits"

    def measure(self, samples: Path, count: int | None = None) -> Evaluation:
        """Every metric of a folder or a file of images, all or the first `count`, or of features that are stored."""
        if self.extractor is None:
            features, labels = stored_features(samples, "--samples"), None
            identity = {"samples": samples.name, "features": STORED, "network": "stored features"}
        else:
            images = open_images(samples, "--samples", count)
            if getattr(images, "are_jpeg", False) and not self.reference.of_jpeg:
                logger.warning("%s holds JPEG files, and the reference is of none: what JPEG loses counts as a "
                               "difference between them; samples must be PNG to be compared", samples)  # fmt: skip
            labels = known_labels(samples, images) if isinstance(self.extractor, DigitsExtractor) else None
            features = self.extract(samples, images)
            identity = {
                "samples": samples.name,
                "digest": images.digest(),
                "features": self.extractor.key,
                "network": self.extractor.describe(),
            }
        settings = {
            **identity,
            "count": len(features),
            "dimension": features.dimension,
            "reference": self.reference.name,
            "reference_count": self.reference.count,
            **asdict(self.settings),
        }
        return Evaluation(measure(features, self.reference, self.settings, labels), settings)

    def extract(self, samples: Path, images: ImageFiles | NpzImages) -> Features:
        """The images' features under a progress bar, kept beside the samples if that folder can be written."""
        cache = beside(samples, "features")
        with Bar("samples") as bar:
            return extract(
                self.extractor,
                images,
                self.batch_size,
                lambda done: bar.advance(done, len(images)),
                cache if os.access(cache.parent, os.W_OK) else None,
            )


def real_side(reference: str, extractor: Extractor, batch_size: int) -> Reference:
    """`load_reference` under a progress bar."""
    with Bar("reference") as bar:
        return load_reference(reference, extractor, batch_size, bar.advance)


class Bar:
    """A progress bar that appears with the first images."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, images: int, of: int) -> None:
        """So many images more are done, of so many in all."""
        if self.bar is None:
            self.bar = progress_bar(total=of, unit="image", desc=self.name)
        self.bar.update(images)


def known_labels(samples: Path, images: ImageFiles | NpzImages) -> np.ndarray | None:
    """What each digit should show (N,): from the .npz, or from the sample folder's record. None if nobody knows."""
    if isinstance(images, NpzImages):
        labels = images.labels
        if labels is not None and labels.shape != (len(images),):
            raise UserError(f"labels in {samples} have shape {labels.shape}; they must be ({len(images)},)")
        return labels
    numbers = images.numbers()
    if numbers is None or not (samples / RECORD).is_file():
        return None
    settings = read_record(samples).settings
    return choose_labels(settings["labels"], settings["global_seed"], numbers, NUM_CLASSES)


def beside(samples: Path, ending: str) -> Path:
    """<samples>-<ending>: the same for a folder and for the .npz of its images."""
    samples = samples if samples.name not in ("", "..") else samples.resolve()
    name = samples.name if samples.is_dir() else samples.stem
    return samples.with_name(f"{name}-{ending}")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The entries of an evaluation.json, oldest first; none if there is no file. UserError if it is something else."""
    if not path.exists():
        return []
    entries = read_json(path, "the evaluations of samples", needs=["evaluations"])["evaluations"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "settings" in entry for entry in entries):
        raise UserError(f"{path} must be the evaluations of samples, a list of entries with settings; move it away")
    return entries


def keep_evaluation(path: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add an entry, in place of one with the same settings; the file is replaced whole, or stays as it was.

    Another command that does the same waits. UserError if it cannot be written.
    """
    settings = json.loads(json.dumps(settings))  # as it will be read: tuples become lists
    with writing(str(path), "what was measured before is kept"), updating(path):
        others = [entry for entry in read_evaluations(path) if entry["settings"] != settings]
        write_json(path, {"evaluations": [*others, {"settings": settings, **measured}]}, indent=1)


def metrics_record(results: Sequence[Result]) -> dict[str, Any]:
    """Results by their keys: value, and spread and note where there are any."""
    return {
        result.key: {
            "value": result.value,
            **({"spread": result.spread} if result.spread is not None else {}),
            **({"note": result.note} if result.note else {}),
        }
        for result in results
    }


RECORDS = "evaluation.jsonl"
BATCH = 250  # images drawn at once when a checkpoint is scored


@dataclass(frozen=True)
class Scores:
    """distance: Fréchet distance to all real digits. accuracy: 0 to 1, None if the labels are not known."""

    fd: float
    label_accuracy: float | None
    samples: int


@dataclass(frozen=True)
class Yardstick:
    """What images are held against: the classifier, the real digits in its features, and how far apart those are.

    halves: the Fréchet distance between two random halves of the real digits, for scale. It is not a lower bound:
    halves are smaller sets than those that are scored, and the distance of small sets is biased upwards.
    """

    classifier: Classifier
    real: Gaussian
    halves: float

    def score(self, images: np.ndarray, labels: np.ndarray | None) -> Scores:
        """Score images (N, 8, 8, 3) uint8 with the labels (N,) that were asked for, or None."""
        evaluated = self.classifier(images)
        distance = frechet_distance(fit_gaussian(evaluated.features), self.real)
        return Scores(distance, None if labels is None else evaluated.accuracy(labels), len(images))


def load_yardstick(cache: Path, settings: ClassifierConfig | None = None) -> Yardstick:
    """The classifier from the folder `cache`, trained first if missing, with the statistics of the real digits."""
    classifier = load_classifier(cache, settings or ClassifierConfig())
    features = classifier(real_digits()[0]).features
    order = np.random.default_rng(classifier.settings.seed).permutation(len(features))
    first, second = np.array_split(features[order], 2)
    return Yardstick(classifier, fit_gaussian(features), frechet_distance(fit_gaussian(first), fit_gaussian(second)))


def evaluate_checkpoints(
    run: Path,
    checkpoints: list[Path],
    settings: SamplingConfig,
    count: int,
    yardstick: Yardstick,
    progress: Callable[[Path, int], None] = lambda checkpoint, images: None,
) -> list[dict[str, Any]]:
    """Score checkpoints of one run with `count` images each; their records, in the order given.

    Every record is appended to evaluation.jsonl in the run's folder as soon as it is known. A record that is there
    already, of the same content and the same settings, is taken from there. `progress` hears of every batch drawn.
    """
    known = {fingerprint(record): record for record in read_records(run / RECORDS)}
    records = []
    for checkpoint in checkpoints:
        identity = {
            **checkpoint_identity(checkpoint),
            "samples": count,
            **settings.sampling_fields(),
            "classifier": yardstick.classifier.settings.digest(),
        }
        record = known.get(fingerprint(identity)) or known.get(fingerprint(as_before(identity, checkpoint)))
        if record is None:
            record = evaluate_checkpoint(checkpoint, settings, count, yardstick, progress, identity)
            known[fingerprint(record)] = record
            append_record(run / RECORDS, record)
        else:
            progress(checkpoint, count)
        records.append(record)
    return records


def evaluate_checkpoint(
    checkpoint: Path,
    settings: SamplingConfig,
    count: int,
    yardstick: Yardstick,
    progress: Callable[[Path, int], None],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Draw `count` images from one checkpoint and score them. Raises UserError if it does not draw digits."""
    student = load_checkpoint(checkpoint, settings.ema, convention=settings.convention)
    check_on_digits(student)
    sampler = Sampler(student, settings)
    if settings.error_threshold:  # as haste sample: the same full steps for all images
        sampler = sampler.with_full_steps(measure_full_steps(sampler))
    begin = perf_counter()
    batches = []
    for start in range(0, count, BATCH):
        batches.append(sampler.draw(range(start, min(start + BATCH, count))))
        progress(checkpoint, len(batches[-1][1]))
    seconds = perf_counter() - begin
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    scores = asdict(yardstick.score(images, labels))
    return {"step": student.step, **identity, **scores, "seconds": round(seconds, 2)}


def check_on_digits(student: LoadedCheckpoint) -> None:
    """UserError for a model that was not trained on the digits, or whose file does not tell on what it was."""
    data = student.config.data_dir
    if data != "digits":
        known = f"was trained on {data!r}" if data else "does not tell what it was trained on"
        raise UserError(
            f"{student.checkpoint} {known}; the classifier knows digits only; give --features and --reference"
        )


def fingerprint(record: dict[str, Any]) -> str:
    """What makes two records answers to the same question, as text."""
    measured = ("step", "fd", "label_accuracy", "seconds")
    return json.dumps({name: value for name, value in record.items() if name not in measured}, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an evaluation.jsonl; lines that are none, such as a last one that a kill cut short, are passed
    over."""
    return [record for record in read_lines(path)[0] if is_score(record)]


def is_score(record: dict[str, Any]) -> bool:
    """Whether a record holds what `evaluate_checkpoints` returns."""
    step = record.get("step")
    return (
        isinstance(record.get("checkpoint"), str)
        and (step is None or is_step(step))
        and all(finite(record.get(name)) is not None for name in ("fd", "label_accuracy"))
    )


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line; the file is replaced whole, so that a kill leaves the old lines or the new.

    Another command that does the same waits. UserError if it cannot be written.
    """
    with writing(str(path), "the scores that are there are kept, and the same command goes on"), updating(path):
        write_text(path, "".join(json.dumps(line) + "\n" for line in [*read_lines(path)[0], record]))
