"""`haste.evaluate`: the metrics of one set of images, of a folder or file of them, or of what a checkpoint samples.

What these have beside their pixels is found here: the labels and captions of a sample folder or an .npz. An `Evaluator`
of `haste.metrics` scores any number of sets against one reference.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from haste.data.images import ImageArray, ImageFiles, ImageSet, NpzImages, open_images
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
from haste.generation.sample_dir import CAPTIONS, RECORD, open_sampler, read_captions, read_record
from haste.metrics.config import STORED, MetricConfig
from haste.metrics.evaluator import NAMES, Evaluation, Evaluator, Result
from haste.metrics.reference import stored_features
from haste.samplers.labels import choose_labels
from haste.validation import check_number, shown

if TYPE_CHECKING:
    from haste.evaluation.clip import ClipExtractor


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
        metrics: keys of NAMES; `haste.metrics.formulas` defines them.
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
            evaluation = score_samples(evaluator, path, num_images, metrics, labels)
            if clip is None:
                return evaluation
            found = open_images(path, "samples", num_images)
            captions = recorded_captions(path, found) if captions is None else captions
            return _with_clip_score(evaluation, clip, found, captions, batch_size)
        samples = load_checkpoint(path)
    sampler = open_sampler(samples, sampling or SamplingConfig(labels="balanced"))
    images, labels = sampler.sample_batches(num_images or 1000, batch_size)
    evaluation = evaluator.of_images(ImageArray(images, lossy=False), samples.checkpoint.name, labels, metrics)
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
    settings = {**evaluation.settings, "clip": extractor.key}
    return replace(evaluation, results=[*evaluation.results, result], settings=settings)


def clip_score(
    extractor: ClipExtractor, images: ImageSet, captions: Sequence[str], batch_size: int, cache: Path | None = None
) -> Result:
    """The mean score of images with their captions; `cache` keeps the features of the images."""
    before = extractor.truncated
    score = float(extractor.scores(images, captions, batch_size, cache).mean())
    cut = extractor.truncated - before
    return Result("clip_score", score, note=f"{cut:,} of the captions have more than the {extractor.tokens} tokens of "
                  f"{extractor.describe()}, which reads their beginning." if cut else None)  # fmt: skip


def score_samples(
    evaluator: Evaluator,
    samples: Path,
    count: int | None = None,
    metrics: Collection[str] = tuple(NAMES),
    labels: np.ndarray | None = None,
) -> Evaluation:
    """Score a folder or file of images, all or the first `count`, or of stored features."""
    if evaluator.extractor is None:
        features = stored_features(samples, "--samples")
        identity = {"samples": samples.name, "features": STORED, "network": "stored features"}
        return evaluator.of_features(features, labels, metrics, identity)
    images = open_images(samples, "--samples", count)
    if labels is None and evaluator.classes is not None:
        labels = _recorded_labels(samples, images, evaluator.classes)
    folder = beside(samples, "features")
    cache = folder if os.access(folder.parent, os.W_OK) else None
    return evaluator.of_images(images, samples.name, labels, metrics, cache)


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
