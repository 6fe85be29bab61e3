"""From sets of pictures on disk to all metrics: one network and one reference, for any number of sets."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError
from haste.evaluation.features import Extractor, Features, JudgeExtractor, extract, load_extractor
from haste.evaluation.judge import NUM_CLASSES
from haste.evaluation.metrics import MetricSettings, Result, measure
from haste.evaluation.picture_sets import NpzPictures, PictureFiles, open_pictures
from haste.evaluation.record import beside
from haste.evaluation.reference import STORED, Reference, load_reference, stored_features, stored_reference
from haste.generation.labels import choose_labels
from haste.generation.sample_folder import RECORD, read_record
from haste.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Results of one set of samples, and everything that they depend on, as plain values."""

    results: list[Result]
    settings: dict[str, Any]


class Evaluator:
    """Measures samples in the features of one network against one reference.

    features, reference: as --features and --reference name them. judge_dir: where the judge of the digits is kept.
    Raises UserError for what does not exist or does not go together.
    """

    def __init__(
        self, features: str, reference: str, judge_dir: Path, batch_size: int, settings: MetricSettings
    ) -> None:
        self.batch_size = batch_size
        self.settings = settings
        self.extractor = None if features == STORED else load_extractor(features, judge_dir)
        if self.extractor is None:
            self.reference = stored_reference(reference)
        else:
            self.reference = real_side(reference, self.extractor, batch_size)

    @property
    def on_digits(self) -> bool:
        """Whether the judge of the digits compares with the real digits."""
        return isinstance(self.extractor, JudgeExtractor) and self.reference.name == "digits"

    def measure(self, samples: Path, count: int | None = None) -> Evaluation:
        """Every metric of a folder or a file of pictures, all or the first `count`, or of features that are stored."""
        if self.extractor is None:
            features, labels = stored_features(samples, "--samples"), None
            identity = {"samples": samples.name, "features": STORED, "network": "stored features"}
        else:
            pictures = open_pictures(samples, "--samples", count)
            if getattr(pictures, "are_jpeg", False) and not self.reference.of_jpeg:
                logger.warning("%s holds JPEG files, and the reference is of none: what JPEG loses counts as a "
                               "difference between them; samples must be PNG to be compared", samples)  # fmt: skip
            labels = known_labels(samples, pictures) if isinstance(self.extractor, JudgeExtractor) else None
            features = self.extract(samples, pictures)
            identity = {
                "samples": samples.name,
                "digest": pictures.digest(),
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

    def extract(self, samples: Path, pictures: PictureFiles | NpzPictures) -> Features:
        """The pictures' features under a progress bar, kept beside the samples if that folder can be written."""
        cache = beside(samples, "features")
        with Bar("samples") as bar:
            return extract(
                self.extractor,
                pictures,
                self.batch_size,
                lambda done: bar.advance(done, len(pictures)),
                cache if os.access(cache.parent, os.W_OK) else None,
            )


def real_side(reference: str, extractor: Extractor, batch_size: int) -> Reference:
    """`load_reference` under a progress bar."""
    with Bar("reference") as bar:
        return load_reference(reference, extractor, batch_size, bar.advance)


class Bar:
    """A progress bar that appears with the first pictures."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, pictures: int, of: int) -> None:
        """So many pictures more are done, of so many in all."""
        if self.bar is None:
            self.bar = progress_bar(total=of, unit="image", desc=self.name)
        self.bar.update(pictures)


def known_labels(samples: Path, pictures: PictureFiles | NpzPictures) -> np.ndarray | None:
    """What each digit should show (N,): from the .npz, or from the sample folder's record. None if nobody knows."""
    if isinstance(pictures, NpzPictures):
        labels = pictures.labels
        if labels is not None and labels.shape != (len(pictures),):
            raise UserError(f"labels in {samples} have shape {labels.shape}; they must be ({len(pictures)},)")
        return labels
    numbers = pictures.numbers()
    if numbers is None or not (samples / RECORD).is_file():
        return None
    settings = read_record(samples).settings
    return choose_labels(settings["labels"], settings["global_seed"], numbers, NUM_CLASSES)
