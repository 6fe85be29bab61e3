"""The command `haste evaluate`: evaluates samples, a checkpoint or all checkpoints of a run, and keeps the numbers.

<samples>-evaluation.json   beside the samples: an entry for each combination of images, network, reference and
                            settings; a new entry replaces one with the same settings
<samples>-features/         cached features of the images, by network
<run>/evaluation.jsonl      of a run on data with a classifier: the scores of each checkpoint (checkpoints.py)
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from haste.caching.config import CacheConfig
from haste.data.images import open_images
from haste.errors import UserError, require
from haste.evaluation.checkpoints import (
    checkpoints_text,
    describe_reference,
    evaluate_by_classifier,
    load_evaluator,
    records_text,
)
from haste.evaluation.config import FULL, EvaluateConfig
from haste.evaluation.evaluate import beside, clip_score, recorded_captions, score_samples
from haste.evaluation.fidelity import compare_sets, fidelity_text, step_errors, steps_text, summarise_steps
from haste.evaluation.records import keep_evaluation
from haste.evaluation.relative import relative_fd
from haste.generation.loaded import load_checkpoint, run_checkpoints
from haste.generation.pipeline import Sampler, fit_to_family
from haste.generation.sample_dir import read_record, sample_to_folder
from haste.io import writing
from haste.metrics.config import STORED, choose_features
from haste.metrics.evaluator import Evaluation, Evaluator, notes
from haste.registry import DATASETS, EXTRACTORS, IMAGE_SIZES

if TYPE_CHECKING:
    from haste.evaluation.clip import ClipExtractor

STEP_IMAGES = 64  # whose states are compared after every step


def evaluate_config(config: EvaluateConfig) -> str:
    """Evaluate what the settings of `haste evaluate` name, and return the text. Raises UserError."""
    if config.run is None:
        return evaluate_samples(config)
    names = {config.features, config.reference} - {None}
    own = len(names) <= 1 and names <= set(EXTRACTORS)
    if own and config.clip is None:  # the data's own classifier, which is fastest
        return records_text(*evaluate_by_classifier(config))
    return evaluate_run(config)


# ---- any images, all metrics ----


def evaluate_samples(config: EvaluateConfig) -> str:
    """Compute every metric of one set of images, and its fidelity to a baseline; keep both beside the images."""
    # Check what exists before the reference is read, which may take hours.
    if config.samples is not None and config.features != STORED:
        open_images(config.samples, "--samples")
    if config.baseline is not None:
        require("skimage.metrics")
        if config.baseline != FULL:
            open_images(Path(config.baseline), "--baseline")
    networks, without = choose_own(config), config.baseline is not None or config.clip is not None
    alone = networks is None and config.reference is None and without
    evaluators = [] if alone else open_evaluators(config, networks)
    clip = open_clip(config)
    samples = config.samples or sample_to_folder(config.sample_config()).folder.path
    count = None if config.samples is not None else config.num_fid_samples  # the folder may hold more
    parts, evaluations = [], []
    for evaluator in evaluators:
        evaluation = score_samples(evaluator, samples, count)
        parts += [evaluation.heading(), str(evaluation)]
        if evaluator.classes is not None and evaluator.reference.name in DATASETS:
            parts[-1] += f"\n{describe_reference(evaluator)}"
        keep(samples, evaluation)
        evaluations.append(evaluation)
        if not without and all(result.value is None for result in evaluation.results):
            flag, which = ("--num-fid-samples", "") if config.samples is None else ("--samples", f"{samples} with ")
            raise UserError(
                f"{flag} must be enough for one metric at least, got {which}{evaluation.settings['count']}: "
                + " ".join(notes(evaluation.results))
            )
    if config.relative_to is not None:
        relative = relative_fd(evaluations, config.relative_to)
        parts += [str(relative)]
        keep(samples, relative)
    if clip is not None:
        parts += [str(evaluate_clip(clip, samples, count, config.per_proc_batch_size))]
    if config.baseline is not None:
        parts += compare_with_baseline(config, config.baseline, samples, count)
    return "\n\n".join([*parts, f"kept in  {beside(samples, 'evaluation.json')}"])


def evaluate_run(config: EvaluateConfig) -> str:
    """Compute every metric of every checkpoint of a run."""
    checkpoints = run_checkpoints(config.trained)
    networks = choose_own(config)
    alone = networks is None and config.reference is None and config.clip is not None
    evaluator, clip = None if alone else open_evaluators(config, networks)[0], open_clip(config)
    rows, headings = [], []
    for checkpoint in checkpoints:
        samples = sample_to_folder(config.sample_config(ckpt=checkpoint)).folder.path
        found = []
        if evaluator is not None:
            found += [score_samples(evaluator, samples, config.num_fid_samples)]
            keep(samples, found[-1])
        if clip is not None:
            found += [evaluate_clip(clip, samples, config.num_fid_samples, config.per_proc_batch_size)]
        rows.append((checkpoint.stem, [result for evaluation in found for result in evaluation.results]))
        headings = [Evaluation([], {**each.settings, "samples": config.trained.name}).heading() for each in found]
    return "\n\n".join([*headings, checkpoints_text(rows)])


def open_clip(config: EvaluateConfig) -> ClipExtractor | None:
    """The CLIP model of --clip, if it is given; of images that are there, first refuse those without captions."""
    if config.clip is None:
        return None
    from haste.evaluation.clip import ClipExtractor

    if config.samples is not None:
        recorded_captions(config.samples, open_images(config.samples, "--samples"))
    return ClipExtractor(config.clip)


def evaluate_clip(clip: ClipExtractor, samples: Path, count: int | None, batch_size: int) -> Evaluation:
    """Compute and keep the CLIP score of a folder or file of images with captions, all or the first `count`."""
    images = open_images(samples, "--samples", count)
    folder = beside(samples, "features")
    cache = folder if os.access(folder.parent, os.W_OK) else None
    result = clip_score(clip, images, recorded_captions(samples, images), batch_size, cache)
    identity = {"digest": images.digest(), "features": clip.key, "network": clip.describe()}
    evaluation = Evaluation([result], {"samples": samples.name, **identity, "count": len(images)})
    keep(samples, evaluation)
    return evaluation


def open_evaluators(config: EvaluateConfig, networks: str | None) -> list[Evaluator]:
    """Load each network of --features with its reference, and save the reference with --save-reference."""
    names = [None] if networks is None else networks.split(",")
    references = [config.reference] if config.reference is None else config.reference.split(",")
    if len(references) == 1:
        references *= len(names)
    pairs = [choose_features(*pair) for pair in zip(names, references, strict=True)]
    return [load_evaluator(config, *pair, config.per_proc_batch_size) for pair in pairs]


def choose_own(config: EvaluateConfig) -> str | None:
    """--features, or the extractor for the data; None where a CLIP score is all that is asked for."""
    if config.clip is not None and config.features is None and config.reference is None:
        return None
    return config.features or _own_features(config)


def _own_features(config: EvaluateConfig) -> str | None:
    """The extractor for the data: by the run's --data-dir, or by the size of the images."""
    if config.samples is None:
        data = load_checkpoint(config.trained, config.weights, convention=config.convention).config.data_dir
        return data if data in EXTRACTORS else None
    shape = open_images(config.samples, "--samples").shape
    return next((name for name, side in IMAGE_SIZES.items() if shape == (side, side, 3)), None)


def compare_with_baseline(config: EvaluateConfig, given: str, samples: Path, count: int | None) -> list[str]:
    """Compute PSNR and SSIM to the baseline; for --baseline full also the errors of the states after each step."""
    if given == FULL:
        baseline = sample_to_folder(config.sample_config(fast=False, **asdict(CacheConfig()))).folder.path
    else:
        baseline = Path(given)
    fidelity = compare_sets(samples, baseline, count).summary()
    parts = [f"{samples.name} beside {baseline.name}, {fidelity['images']:,} images", fidelity_text(fidelity)]
    measured: dict[str, Any] = {"fidelity": fidelity}
    if given == FULL:
        errors = compare_steps(config, samples)
        parts[-1] += f"\n{steps_text(errors)}"
        measured["step_errors"] = summarise_steps(errors)
    settings = {"samples": samples.name, "baseline": baseline.name, "count": fidelity["images"]}
    keep_evaluation(beside(samples, "evaluation.json"), settings, measured)
    return parts


def compare_steps(config: EvaluateConfig, samples: Path) -> np.ndarray:
    """Sample the first images again with and without the cache; return and plot the states' errors (steps, images)."""
    from haste.plotting import plot_step_errors

    loaded = load_checkpoint(config.trained, config.weights, convention=config.convention)
    settings = fit_to_family(config.sampling_config(), loaded, config.fast)
    cached, full = Sampler(loaded, settings), Sampler(loaded, replace(settings, **asdict(CacheConfig())))
    full_steps = read_record(samples).full_steps
    if full_steps is not None:  # measured by --error-threshold
        cached = cached.with_full_steps(full_steps)
    errors = step_errors(cached, full, range(min(config.num_fid_samples, STEP_IMAGES)))
    title = f"{loaded.label}\n{settings.describe()}"
    plot = beside(samples, "step-errors.png")
    with writing(str(plot)):
        plot_step_errors(plot, errors, title=title, full_steps=cached.cache.full_steps)
    return errors


def keep(samples: Path, evaluation: Evaluation) -> None:
    """Write an evaluation beside its samples."""
    caution = {} if evaluation.caution is None else {"caution": evaluation.caution}
    measured = {"metrics": evaluation.record(), **caution}
    keep_evaluation(beside(samples, "evaluation.json"), evaluation.settings, measured)
