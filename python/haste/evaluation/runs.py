"""The command `haste evaluate`: evaluates samples, a checkpoint or all checkpoints of a run, and keeps the numbers.

<samples>-evaluation.json   beside the samples: an entry for each combination of images, network, reference and
                            settings; a new entry replaces one with the same settings
<samples>-features/         cached features of the images, by network
<run>/evaluation.jsonl      of a run on data with a classifier: FD and label accuracy of each checkpoint
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from haste.caching.config import CacheConfig
from haste.data.images import open_images
from haste.distributed import progress_bar
from haste.errors import UserError, require
from haste.evaluation.config import FULL, STORED, EvaluateConfig, MetricConfig
from haste.evaluation.evaluate import (
    TITLES,
    Evaluation,
    Evaluator,
    Result,
    beside,
    clip_score,
    notes,
    recorded_captions,
)
from haste.evaluation.features import extract
from haste.evaluation.fidelity import compare_sets, fidelity_text, step_errors, steps_text, summarise_steps
from haste.evaluation.reference import check_replaceable, save_reference
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import LoadedCheckpoint, Sampler, fit_to_family, load_checkpoint, run_checkpoints
from haste.generation.sample_dir import open_sampler, read_record, sample_to_folder
from haste.io import read_json, write_json, writing
from haste.registry import DATASETS, EXTRACTORS, IMAGE_SIZES
from haste.resumable import append_line, read_lines, updating
from haste.tables import NONE, known_columns, text_table
from haste.training.checkpoint import checkpoint_identity
from haste.training.logging import alignment_end, finite, is_step, read_log

if TYPE_CHECKING:
    from haste.evaluation.clip import ClipExtractor

RECORDS = "evaluation.jsonl"
OF_CHECKPOINTS = ("fd", "label_accuracy")
SAMPLED_AT_ONCE = 250  # images, when checkpoints are evaluated without a folder of samples
CLASSIFIED_AT_ONCE = 512
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
    features, without = choose_own(config), config.baseline is not None or config.clip is not None
    alone = features is None and config.reference is None and without
    evaluator = None if alone else open_evaluator(config, features)
    clip = open_clip(config)
    samples = config.samples or sample_to_folder(config.sample_config()).folder.path
    count = None if config.samples is not None else config.num_fid_samples  # the folder may hold more
    parts = []
    if evaluator is not None:
        evaluation = evaluator.of_samples(samples, count)
        parts += [evaluation.heading(), str(evaluation)]
        if evaluator.classes is not None and evaluator.reference.name in DATASETS:
            parts[-1] += f"\n{describe_reference(evaluator)}"
        keep(samples, evaluation)
        if not without and all(result.value is None for result in evaluation.results):
            flag, which = ("--num-fid-samples", "") if config.samples is None else ("--samples", f"{samples} with ")
            raise UserError(
                f"{flag} must be enough for one metric at least, got {which}{evaluation.settings['count']}: "
                + " ".join(notes(evaluation.results))
            )
    if clip is not None:
        parts += [str(evaluate_clip(clip, samples, count, config.per_proc_batch_size))]
    if config.baseline is not None:
        parts += compare_with_baseline(config, config.baseline, samples, count)
    return "\n\n".join([*parts, f"kept in  {beside(samples, 'evaluation.json')}"])


def evaluate_run(config: EvaluateConfig) -> str:
    """Compute every metric of every checkpoint of a run."""
    checkpoints = run_checkpoints(config.trained)
    features = choose_own(config)
    alone = features is None and config.reference is None and config.clip is not None
    evaluator, clip = None if alone else open_evaluator(config, features), open_clip(config)
    rows, headings = [], []
    for checkpoint in checkpoints:
        samples = sample_to_folder(config.sample_config(ckpt=checkpoint)).folder.path
        found = []
        if evaluator is not None:
            found += [evaluator.of_samples(samples, config.num_fid_samples)]
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


def open_evaluator(config: EvaluateConfig, features: str | None) -> Evaluator:
    """Load the network and the reference, and save the reference with --save-reference."""
    features, reference = choose_features(features, config.reference)
    return load_evaluator(config, features, reference, config.per_proc_batch_size)


def load_evaluator(
    config: EvaluateConfig, features: str, reference: str, batch_size: int, samples: int | None = None
) -> Evaluator:
    """`Evaluator.load`, and save the reference with --save-reference."""
    if config.save_reference is not None:
        check_replaceable(config.save_reference)
    metrics = MetricConfig(kid_subset_size=config.kid_subset_size)
    evaluator = Evaluator.load(features, reference, config.folder_of_classifier, batch_size, metrics, samples)
    if config.save_reference is not None:
        save_reference(config.save_reference, evaluator.reference)
    return evaluator


def choose_features(features: str | None, reference: str | None) -> tuple[str, str]:
    """The names of the features and the reference, by default the features' own data. UserError if one is missing."""
    if features is None:
        raise UserError(
            "--features must be given: inception:PATH, or a teacher's name or folder such as dinov2-vit-l (there is a "
            f"default for {', '.join(EXTRACTORS)} alone)"
        )
    reference = reference or (features if features in DATASETS else None)
    if reference is None:
        raise UserError(
            f"--reference must be given with --features {features}: a folder of real images, or an .npz of images or "
            "statistics"
        )
    return features, reference


def choose_own(config: EvaluateConfig) -> str | None:
    """--features, or the extractor for the data; None where a CLIP score is all that is asked for."""
    if config.clip is not None and config.features is None and config.reference is None:
        return None
    return config.features or _own_features(config)


def _own_features(config: EvaluateConfig) -> str | None:
    """The extractor for the data: by the run's --data-dir, or by the size of the images."""
    if config.samples is None:
        data = load_checkpoint(config.trained, config.ema, convention=config.convention).config.data_dir
        return data if data in EXTRACTORS else None
    shape = open_images(config.samples, "--samples").shape
    return next((name for name, side in IMAGE_SIZES.items() if shape == (side, side, 3)), None)


def describe_reference(evaluator: Evaluator) -> str:
    """How to read scores by a classifier of the data: the split-half FD, and the accuracy of the classifier."""
    extractor, reference = evaluator.extractor, evaluator.reference
    assert extractor is not None
    return (
        f"FD to {reference.count:,} real {reference.name} in {reference.dimension} features of {extractor.describe()}; "
        f"two halves of these have an FD of {evaluator.split_half_fd:.2f}.\n"
        f"The classifier's accuracy on held-out real {reference.name} is {extractor.held_out_accuracy:.1%}."
    )


def checkpoints_text(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One row per checkpoint, one column per metric that any of them has, then the notes."""
    keys = [result.key for result in rows[0][1]]
    cells = []
    for name, results in rows:
        by_key = {result.key: str(result) for result in results}
        cells.append([name, *(by_key.get(key, NONE) for key in keys)])
    table = text_table(known_columns(["step", *(TITLES[key] for key in keys)], cells), ">")
    return "\n".join([table, *dict.fromkeys(line for _, results in rows for line in notes(results))])


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

    loaded = load_checkpoint(config.trained, config.ema, convention=config.convention)
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
    keep_evaluation(beside(samples, "evaluation.json"), evaluation.settings, {"metrics": evaluation.record()})


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Read the entries of an evaluation.json, oldest first; none if there is no file. UserError for another file."""
    if not path.exists():
        return []
    entries = read_json(path, "the evaluations of samples", needs=["evaluations"])["evaluations"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "settings" in entry for entry in entries):
        raise UserError(f"{path} must be the evaluations of samples, a list of entries with settings; move it away")
    return entries


def keep_evaluation(path: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add an entry, or replace one with the same settings, atomically and under a lock. UserError if that fails."""
    settings = json.loads(json.dumps(settings))  # as it is read back: tuples become lists
    with writing(str(path), "what was measured before is kept"), updating(path):
        others = [entry for entry in read_evaluations(path) if entry["settings"] != settings]
        write_json(path, {"evaluations": [*others, {"settings": settings, **measured}]}, indent=1)


# ---- the checkpoints of a run on data with a classifier ----


def evaluate_by_classifier(config: EvaluateConfig) -> tuple[list[dict[str, Any]], Evaluator]:
    """Compute and plot FD and label accuracy of every checkpoint of a run. Raises UserError."""
    config.check()
    if config.labels == "none":
        raise UserError("--labels must be classes with --run, which has the accuracy of labels, got none; --ckpt "
                        "evaluates images of no class")  # fmt: skip
    require("matplotlib")
    run, count = config.trained, config.num_fid_samples
    checkpoints = run_checkpoints(run)
    with writing(str(run / RECORDS)), updating(run / RECORDS):
        pass  # a folder that cannot be written is refused before anything is sampled
    loaded = load_checkpoint(run, config.ema, convention=config.convention)
    name, config = classifier_for(loaded), fit_to_family(config, loaded, config.fast)
    evaluator = load_evaluator(config, name, name, CLASSIFIED_AT_ONCE, count)
    with progress_bar(total=len(checkpoints) * count, unit="image", desc="evaluate") as bar:

        def progress(checkpoint: Path, images: int) -> None:
            bar.set_postfix_str(checkpoint.stem, refresh=False)
            bar.update(images)

        records = evaluate_checkpoints(run, checkpoints, config, count, evaluator, progress)
    plot_run(run, config, records)
    return records, evaluator


def evaluate_checkpoints(
    run: Path,
    checkpoints: list[Path],
    settings: SamplingConfig,
    count: int,
    evaluator: Evaluator,
    progress: Callable[[Path, int], None] = lambda checkpoint, images: None,
) -> list[dict[str, Any]]:
    """Score checkpoints of one run with `count` images each, and return their records in the same order.

    Each record is appended to the run's evaluation.jsonl at once. A checkpoint that has one already, of the same
    content and settings, is not evaluated again. `progress` is called with a number of images.
    """
    known = {fingerprint(record): record for record in read_records(run / RECORDS)}
    records = []
    for checkpoint in checkpoints:
        identity = {
            **checkpoint_identity(checkpoint),
            "samples": count,
            **settings.sampling_fields(),
            "evaluated_by": evaluator.key,
        }
        record = known.get(fingerprint(identity))
        if record is None:
            measured = evaluate_checkpoint(checkpoint, settings, count, evaluator, partial(progress, checkpoint))
            record = {"step": measured.pop("step"), **identity, **measured}
            append_record(run / RECORDS, record)
        else:
            progress(checkpoint, count)
        records.append(record)
    return records


def evaluate_checkpoint(
    checkpoint: Path,
    settings: SamplingConfig,
    count: int,
    evaluator: Evaluator,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Sample images from one checkpoint and score them: step, fd, label_accuracy and seconds. Raises UserError."""
    loaded = load_checkpoint(checkpoint, settings.ema, convention=settings.convention)
    classifier_for(loaded)
    sampler = open_sampler(loaded, settings)
    begin = perf_counter()
    images, labels = sampler.sample_batches(count, SAMPLED_AT_ONCE, progress)
    seconds = perf_counter() - begin
    assert evaluator.extractor is not None
    scores = evaluator.values(extract(evaluator.extractor, images, evaluator.batch_size), labels, OF_CHECKPOINTS)
    return {"step": loaded.step, **scores, "seconds": round(seconds, 2)}


def classifier_for(loaded: LoadedCheckpoint) -> str:
    """The name of the classifier of a model's training data; UserError if there is none."""
    data = loaded.config.data_dir
    if data in EXTRACTORS:
        return data
    raise UserError(
        f"--features and --reference must be given for data other than {', '.join(EXTRACTORS)}, got "
        f"{loaded.checkpoint} of {repr(data) if data else 'unknown data'}"
    )


def fingerprint(record: dict[str, Any]) -> str:
    """What two records of the same checkpoint and settings have in common, as text."""
    measured = ("step", "seconds", *OF_CHECKPOINTS)
    return json.dumps({name: value for name, value in record.items() if name not in measured}, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of an evaluation.jsonl, without damaged lines."""
    return [record for record in read_lines(path)[0] if _is_record(record)]


def _is_record(record: dict[str, Any]) -> bool:
    step = record.get("step")
    return (
        isinstance(record.get("checkpoint"), str)
        and (step is None or is_step(step))
        and all(finite(record.get(name)) is not None for name in OF_CHECKPOINTS)
    )


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one record, under a lock. UserError if that fails."""
    with writing(str(path), "existing scores are kept, and the same command resumes"), updating(path):
        append_line(path, record, durable=True)


def plot_run(run: Path, config: EvaluateConfig, records: Sequence[dict[str, Any]]) -> None:
    """Plot the scores over steps to evaluation.png, and the curves of log.jsonl to losses.png, in the run's folder."""
    from haste.plotting import LOSSES, plot_losses, plot_scores

    log = read_log(run / "log.jsonl").lines
    stop = alignment_end(log)
    title = f"{run.name}: {config.num_fid_samples:,} samples a point, {config.describe()}"
    with writing(f"a plot in {run}", "the scores are kept, and the same command plots them"):
        plot_scores(run / "evaluation.png", {run.name: {0: records}}, title=title, stop=stop)
        if any(line.get(name) is not None for line in log for name in LOSSES):
            plot_losses(run / "losses.png", log, title=f"{run.name}: losses", stop=stop)


def records_text(records: Sequence[dict[str, Any]], evaluator: Evaluator) -> str:
    """One row per checkpoint, named by its step or else its file, then how to read the numbers."""
    rows = [
        (
            record["checkpoint"] if record["step"] is None else f"{record['step']:,}",
            [Result(key, record[key]) for key in OF_CHECKPOINTS],
        )
        for record in records
    ]
    return f"{checkpoints_text(rows)}\n\n{describe_reference(evaluator)}"
