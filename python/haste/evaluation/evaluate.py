"""From images to metrics: the features of one network, a reference, and each metric or the reason why it has no value.

`evaluate` scores one set of images; an `Evaluator` scores any number of sets against one reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from haste.data.images import ImageArray, ImageFiles, ImageSet, NpzImages, open_images
from haste.errors import UserError
from haste.evaluation.config import STORED, MetricConfig
from haste.evaluation.features import Extractor, Features, extract, feature_dimension, load_extractor
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
from haste.evaluation.reference import Reference, load_reference, stored_features, stored_reference
from haste.generation.config import SamplingConfig
from haste.generation.labels import choose_labels
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
from haste.generation.sample_dir import CAPTIONS, RECORD, open_sampler, read_captions, read_record
from haste.tables import format_number, text_table
from haste.validation import check_number, shown

if TYPE_CHECKING:
    from haste.evaluation.clip import ClipExtractor

logger = logging.getLogger(__name__)

ADVISED_FOR_PRDC, ADVISED_FOR_INCEPTION_SCORE = 1000, 5000  # images

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
TITLES = {**NAMES, "clip_score": "CLIP score"}  # of all results; this one has a network of its own


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
    """The results of one set of samples, and the settings that they depend on, as plain values."""

    results: list[Result]
    settings: dict[str, Any]

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


def evaluate(
    samples: np.ndarray | Path | str | LoadedCheckpoint,
    features: str,
    reference: str,
    *,
    labels: np.ndarray | None = None,
    sampling: SamplingConfig | None = None,
    metrics: Collection[str] = tuple(NAMES),
    clip: str | None = None,
    captions: Sequence[str] | None = None,
    num_images: int | None = None,
    config: MetricConfig | None = None,
    batch_size: int = 128,
    classifier_dir: Path | str = "classifier",
) -> Evaluation:
    """Compare images, or images sampled from a checkpoint, with a reference.

    Args:
        samples: images (N, H, W, 3) uint8; or a folder, .zip or .npz of images; or a checkpoint to sample from, loaded
            or as the path of its file or run; with features "stored", a file or folder of features.
        features: "inception:PATH", "pytorch-fid:PATH", the name or folder of a vision encoder, "digits", or "stored".
        reference: a folder, .zip or .npz of images or of statistics, or the name of a data set ("digits").
        labels: (N,), the intended classes; known for a sample folder, an .npz with labels and a checkpoint.
        sampling: how to sample from a checkpoint; None for 50 Euler steps and balanced labels.
        metrics: keys of NAMES; `haste.evaluation.metrics` defines them.
        clip: the folder or hub name of a CLIP model, for the CLIP score (`haste.evaluation.clip`).
        captions: (N,), for the CLIP score; known as labels are.
        num_images: to sample from a checkpoint (default: 1,000), or to read from a folder or file (default: all).
        config: the subsets of KID and all seeds.
        batch_size: images per forward pass.
        classifier_dir: the folder that holds the classifier of the digits.

    Returns:
        A result for each metric; one that could not be computed has no value, and the reason as its note.

    Raises:
        UserError: something does not exist, cannot be read, or does not fit the rest.
    """
    if not isinstance(samples, (np.ndarray, Path, str, LoadedCheckpoint)):
        raise UserError(f"samples must be a NumPy array of images, a path or a loaded checkpoint, got {shown(samples)}")
    if num_images is not None:
        check_number("num_images", num_images, "num_images")
    check_number("per_proc_batch_size", batch_size, "batch_size")
    if isinstance(samples, np.ndarray) and (
        samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[-1] != 3 or not samples.size
    ):
        raise UserError(f"samples must be images (N, H, W, 3) uint8, got {samples.dtype} {samples.shape}")
    evaluator = Evaluator.load(features, reference, Path(classifier_dir), batch_size, config)
    if isinstance(samples, np.ndarray):
        evaluation = evaluator.of_images(ImageArray(samples), "images", labels, metrics)
        return _with_clip_score(evaluation, clip, ImageArray(samples), captions, batch_size)
    if not isinstance(samples, LoadedCheckpoint):
        path = Path(samples)
        is_checkpoint = path.suffix in (".pt", ".pth", ".safetensors") or (path / "checkpoints").is_dir()
        if features == STORED or not is_checkpoint:
            evaluation = evaluator.of_samples(path, num_images, metrics, labels)
            if clip is None:
                return evaluation
            found = open_images(path, "samples", num_images)
            captions = recorded_captions(path, found) if captions is None else captions
            return _with_clip_score(evaluation, clip, found, captions, batch_size)
        samples = load_checkpoint(path)
    sampler = open_sampler(samples, sampling or SamplingConfig(labels="balanced"))
    images, labels = sampler.sample_batches(num_images or 1000, batch_size)
    evaluation = evaluator.of_images(ImageArray(images), samples.checkpoint.name, labels, metrics)
    captions = captions or known_captions(sampler.conditions.captions(range(len(images))), samples.checkpoint)
    return _with_clip_score(evaluation, clip, ImageArray(images), captions, batch_size)


def _with_clip_score(
    evaluation: Evaluation, clip: str | None, images: ImageSet, captions: Sequence[str] | None, batch_size: int
) -> Evaluation:
    """The evaluation with the CLIP score as its last result, if a CLIP model is named."""
    if clip is None:
        return evaluation
    if captions is None:
        raise UserError(f"captions must be given for a CLIP score of {evaluation.settings['samples']}, got none")
    from haste.evaluation.clip import ClipExtractor

    extractor = ClipExtractor(clip)
    result = clip_score(extractor, images, captions, batch_size)
    return Evaluation([*evaluation.results, result], {**evaluation.settings, "clip": extractor.key})


def clip_score(
    extractor: ClipExtractor, images: ImageSet, captions: Sequence[str], batch_size: int, cache: Path | None = None
) -> Result:
    """The mean score of images with their captions; `cache` keeps the features of the images."""
    before = extractor.truncated
    score = float(extractor.scores(images, captions, batch_size, cache).mean())
    cut = extractor.truncated - before
    return Result("clip_score", score, note=f"{cut:,} of the captions have more than the {extractor.tokens} tokens of "
                  f"{extractor.describe()}, which reads their beginning." if cut else None)  # fmt: skip


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

    def of_samples(
        self,
        samples: Path,
        count: int | None = None,
        metrics: Collection[str] = tuple(NAMES),
        labels: np.ndarray | None = None,
    ) -> Evaluation:
        """Score a folder or file of images, all or the first `count`, or of stored features."""
        if self.extractor is None:
            features = stored_features(samples, "--samples")
            identity = {"samples": samples.name, "features": STORED, "network": "stored features"}
            return self._evaluation(features, labels, metrics, identity)
        images = open_images(samples, "--samples", count)
        if images.are_jpeg and not self.reference.of_jpeg:
            logger.warning(
                "%s holds JPEG files and the reference does not: JPEG artefacts count as a difference between them; "
                "samples must be PNG to be compared", samples
            )  # fmt: skip
        if labels is None and self.classes is not None:
            labels = _recorded_labels(samples, images, self.classes)
        folder = beside(samples, "features")
        cache = folder if os.access(folder.parent, os.W_OK) else None
        return self.of_images(images, samples.name, labels, metrics, cache)

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
        features = extract(extractor, images, self.batch_size, cache, title="samples")
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


def _recorded_labels(samples: Path, images: ImageFiles | NpzImages, classes: int) -> np.ndarray | None:
    """The intended classes (N,), from the .npz or from the sample folder's record; None where there is neither."""
    if isinstance(images, NpzImages):
        return images.labels
    numbers = images.numbers()
    if numbers is None or not (samples / RECORD).is_file():
        return None
    settings = read_record(samples).settings
    if "labels" not in settings:  # of a model of text
        return None
    return choose_labels(settings["labels"], settings["global_seed"], numbers, classes)


def recorded_captions(samples: Path, images: ImageFiles | NpzImages, flag: str = "--samples") -> list[str]:
    """The captions of images, from the .npz or the sample folder.

    Raises:
        UserError: there are none, or one is not known.
    """
    if isinstance(images, NpzImages):
        found: Sequence[str | None] | None = images.captions
    else:
        numbers, listed = images.numbers(), read_captions(samples) if samples.is_dir() else None
        if numbers is not None and listed is not None:
            listed = [*listed, *[None] * (max(numbers) + 1 - len(listed))]
        found = None if numbers is None or listed is None else [listed[number] for number in numbers]
    captions = known_captions(found, samples)
    if captions is None:
        where = "captions" if isinstance(images, NpzImages) else CAPTIONS
        raise UserError(f"{flag} must hold {where} for a CLIP score, as haste sample writes it, got {samples} without")
    return captions


def known_captions(captions: Sequence[str | None] | None, source: Path) -> list[str] | None:
    """The captions, if there are any. Raises UserError if one is not known, as only its features were."""
    for number, caption in enumerate(captions or ()):
        if not caption:
            raise UserError(f"a CLIP score must have a caption for each image, got none for image {number} of {source}")
    return None if captions is None else [caption for caption in captions if caption]


def beside(samples: Path, ending: str) -> Path:
    """<samples>-<ending>: the same for a folder and for the .npz of its images."""
    samples = samples if samples.name not in ("", "..") else samples.resolve()
    name = samples.name if samples.is_dir() else samples.stem
    return samples.with_name(f"{name}-{ending}")


# ---- the metrics, with their cautions ----


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
