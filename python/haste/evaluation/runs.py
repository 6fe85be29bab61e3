"""What `haste evaluate` does: evaluates samples, a checkpoint or a run's checkpoints, and keeps the numbers.

<samples>-evaluation.json   beside the samples: an entry for each combination of images, network, reference and
                            settings; one of the same settings is replaced
<samples>-features/         features of the images, by network
<run>/evaluation.jsonl      of a run on a data set with a classifier: FD and label accuracy of each checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from haste.caching.config import CacheConfig
from haste.data.images import open_images
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.config import FULL, STORED, EvaluateConfig
from haste.evaluation.evaluate import (
    Evaluation,
    Evaluator,
    MetricConfig,
    beside,
    checkpoints_text,
    image_bar,
    open_sampler,
    sample_images,
)
from haste.evaluation.features import extract
from haste.evaluation.fidelity import compare_sets, fidelity_text, step_errors, steps_text, summarise_steps
from haste.evaluation.metrics import check_sample_size
from haste.evaluation.reference import check_replaceable, save_reference
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import LoadedCheckpoint, Sampler, load_checkpoint, run_checkpoints
from haste.generation.sample_dir import read_record, sample_to_folder
from haste.io import read_json, write_json, writing
from haste.registry import DATASETS, EXTRACTORS, IMAGE_SIZES
from haste.resumable import append_line, read_lines, updating
from haste.tables import text_table
from haste.training.checkpoint import checkpoint_identity
from haste.training.logging import alignment_end, finite, is_step, read_log

RECORDS = "evaluation.jsonl"
OF_CHECKPOINTS = ("fd", "label_accuracy")
SAMPLED_AT_ONCE = 250  # images, when checkpoints are evaluated without a folder of samples
CLASSIFIED_AT_ONCE = 512
STEP_IMAGES = 64  # whose states are compared after every step


# ---- any images, all metrics ----


def evaluate_samples(config: EvaluateConfig) -> str:
    """Every metric of one set of images, and their fidelity to a baseline, as text; both are kept beside the images.

    Raises UserError for what does not exist or does not go together.
    """
    # What is there must be usable before the reference is read, which may take hours.
    if config.samples is not None and config.features != STORED:
        open_images(config.samples, "--samples")
    if config.baseline not in (None, FULL):
        open_images(Path(config.baseline), "--baseline")
    evaluator = open_evaluator(config)
    samples = config.samples or sample_to_folder(config.sample_config()).folder.path
    count = None if config.samples is not None else config.num_fid_samples  # the folder may hold more
    parts = []
    if evaluator is not None:
        evaluation = evaluator.of_samples(samples, count)
        parts += [evaluation.heading(), str(evaluation)]
        if evaluator.knows_labels and evaluator.reference.name in DATASETS:
            parts[-1] += f"\n{evaluator.describe_reference()}"
        keep(samples, evaluation)
    if config.baseline is not None:
        parts += compare_with_baseline(config, samples, count)
    return "\n\n".join([*parts, f"kept in  {beside(samples, 'evaluation.json')}"])


def evaluate_run(config: EvaluateConfig) -> str:
    """Every metric of every checkpoint of a run, one row each, as text."""
    checkpoints = run_checkpoints(config.run)
    evaluator = open_evaluator(config)
    rows = []
    for checkpoint in checkpoints:
        samples = sample_to_folder(config.sample_config(ckpt=checkpoint)).folder.path
        evaluation = evaluator.of_samples(samples, config.num_fid_samples)
        keep(samples, evaluation)
        rows.append((checkpoint.stem, evaluation.results))
    heading = Evaluation([], {**evaluation.settings, "samples": config.run.name}).heading()
    return f"{heading}\n\n{checkpoints_text(rows)}"


def open_evaluator(config: EvaluateConfig) -> Evaluator | None:
    """The network and the reference that the settings name; None if a comparison with a baseline alone is asked for."""
    features = config.features or _own_features(config)
    if features is None and config.reference is None and config.baseline is not None:
        return None
    features, reference = choose_features(features, config.reference)
    if config.save_reference is not None:
        check_replaceable(config.save_reference)
    metrics = MetricConfig(kid_subset_size=config.kid_subset_size)
    evaluator = Evaluator.load(features, reference, config.folder_of_classifier, config.per_proc_batch_size, metrics)
    if config.save_reference is not None:
        save_reference(config.save_reference, evaluator.reference)
    return evaluator


def choose_features(features: str | None, reference: str | None) -> tuple[str, str]:
    """Both names; the reference is that of the features' own data, if they have some. UserError if one is missing."""
    if features is None:
        raise UserError(
            f"--features is not given; for other images than the {' or '.join(EXTRACTORS)} it must be "
            "inception:PATH, or a teacher's name or folder such as dinov2-vit-l"
        )
    reference = reference or (features if features in DATASETS else None)
    if reference is None:
        raise UserError(
            f"--reference is not given; --features {features} needs a folder of real images, or an .npz of images or "
            "statistics"
        )
    return features, reference


def _own_features(config: EvaluateConfig) -> str | None:
    """The extractor of the data: of a run on them, or of images as small as the digits are."""
    if config.samples is None:
        data = load_checkpoint(config.run or config.ckpt, config.ema, convention=config.convention).config.data_dir
        return data if data in EXTRACTORS else None
    shape = open_images(config.samples, "--samples").shape
    return next((name for name, side in IMAGE_SIZES.items() if shape == (side, side, 3)), None)


def compare_with_baseline(config: EvaluateConfig, samples: Path, count: int | None) -> list[str]:
    """PSNR and SSIM to the baseline; of one that is sampled here, also the error of every step's state."""
    uncached = asdict(CacheConfig())
    if config.baseline == FULL:
        baseline = sample_to_folder(config.sample_config(**uncached)).folder.path
    else:
        baseline = Path(config.baseline)
    with image_bar("baseline") as advance:
        fidelity = compare_sets(samples, baseline, advance, count).summary()
    parts = [f"{samples.name} beside {baseline.name}, {fidelity['images']:,} images", fidelity_text(fidelity)]
    measured: dict[str, Any] = {"fidelity": fidelity}
    if config.baseline == FULL:
        errors = compare_steps(config, samples)
        parts[-1] += f"\n{steps_text(errors)}"
        measured["step_errors"] = summarise_steps(errors)
    settings = {"samples": samples.name, "baseline": baseline.name, "count": fidelity["images"]}
    keep_evaluation(beside(samples, "evaluation.json"), settings, measured)
    return parts


def compare_steps(config: EvaluateConfig, samples: Path) -> np.ndarray:
    """The relative errors (steps, images) of the first images' states, sampled as these were, and a plot of them."""
    from haste.plotting import plot_step_errors

    settings = config.sampling_config()
    loaded = load_checkpoint(config.ckpt, config.ema, convention=config.convention)
    cached, full = Sampler(loaded, settings), Sampler(loaded, replace(settings, **asdict(CacheConfig())))
    full_steps = read_record(samples).full_steps
    if full_steps is not None:  # that --error-threshold has found
        cached = cached.with_full_steps(full_steps)
    errors = step_errors(cached, full, range(min(config.num_fid_samples, STEP_IMAGES)))
    title = f"{loaded.label}\n{settings.describe()}"
    plot = beside(samples, "step-errors.png")
    with writing(str(plot)):
        plot_step_errors(plot, errors, title=title, full_steps=cached.cache.full_steps)
    return errors


def keep(samples: Path, evaluation: Evaluation) -> None:
    """Keep an evaluation beside its samples."""
    keep_evaluation(beside(samples, "evaluation.json"), evaluation.settings, {"metrics": evaluation.record()})


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


# ---- the checkpoints of a run on data with a classifier ----


def evaluate_by_classifier(config: EvaluateConfig) -> tuple[list[dict[str, Any]], Evaluator]:
    """FD and label accuracy of every checkpoint of config.run, with two plots; the records, and what they rest on."""
    config.check()
    checkpoints = run_checkpoints(config.run)
    name = classifier_for(load_checkpoint(config.run, config.ema, convention=config.convention))
    evaluator = Evaluator.load(name, name, config.folder_of_classifier, CLASSIFIED_AT_ONCE)
    if caution := check_sample_size(config.num_fid_samples, evaluator.reference.dimension):
        print(caution)
    with progress_bar(total=len(checkpoints) * config.num_fid_samples, unit="image", desc="evaluate") as bar:

        def progress(checkpoint: Path, images: int) -> None:
            bar.set_postfix_str(checkpoint.stem, refresh=False)
            bar.update(images)

        count = config.num_fid_samples
        records = evaluate_checkpoints(config.run, checkpoints, config, count, evaluator, progress)
    plot_run(config, records)
    return records, evaluator


def evaluate_checkpoints(
    run: Path,
    checkpoints: list[Path],
    settings: SamplingConfig,
    count: int,
    evaluator: Evaluator,
    progress: Callable[[Path, int], None] = lambda checkpoint, images: None,
) -> list[dict[str, Any]]:
    """Score checkpoints of one run with `count` images each; their records, in the order given.

    Every record is appended to evaluation.jsonl in the run's folder as soon as it is known. A record that is there
    already, of the same content and the same settings, is taken from there. `progress` counts images.
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
    """Sample images from one checkpoint and score them: step, fd, label_accuracy and seconds of sampling.

    Raises UserError if the evaluator's classifier was not trained on the data of this run, or for too few images.
    """
    loaded = load_checkpoint(checkpoint, settings.ema, convention=settings.convention)
    classifier_for(loaded)
    sampler = open_sampler(loaded, settings)
    begin = perf_counter()
    images, labels = sample_images(sampler, count, SAMPLED_AT_ONCE, progress)
    seconds = perf_counter() - begin
    scores = evaluator.values(extract(evaluator.extractor, images, evaluator.batch_size), labels, OF_CHECKPOINTS)
    return {"step": loaded.step, **scores, "seconds": round(seconds, 2)}


def uses_classifier(config: EvaluateConfig) -> bool:
    """Whether a run's checkpoints are to be evaluated by the classifier of their data, which is quickest."""
    names = {config.features, config.reference} - {None}
    return config.run is not None and len(names) <= 1 and names <= set(EXTRACTORS)


def classifier_for(loaded: LoadedCheckpoint) -> str:
    """The name of the classifier of the data that a model was trained on; UserError if there is none."""
    data = loaded.config.data_dir
    if data in EXTRACTORS:
        return data
    known = f"was trained on {data!r}" if data else "does not tell what it was trained on"
    raise UserError(
        f"{loaded.checkpoint} {known}; the classifier knows {', '.join(EXTRACTORS)} only; give --features and "
        "--reference"
    )


def fingerprint(record: dict[str, Any]) -> str:
    """What makes two records answers to the same question, as text."""
    measured = ("step", "seconds", *OF_CHECKPOINTS)
    return json.dumps({name: value for name, value in record.items() if name not in measured}, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an evaluation.jsonl; lines that are none, such as one that a kill cut short, are left out."""
    return [record for record in read_lines(path)[0] if _is_record(record)]


def _is_record(record: dict[str, Any]) -> bool:
    step = record.get("step")
    return (
        isinstance(record.get("checkpoint"), str)
        and (step is None or is_step(step))
        and all(finite(record.get(name)) is not None for name in OF_CHECKPOINTS)
    )


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line; another command that does the same waits. UserError if it cannot be written."""
    with writing(str(path), "the scores that are there are kept, and the same command resumes"), updating(path):
        append_line(path, record, durable=True)


def plot_run(config: EvaluateConfig, records: Sequence[dict[str, Any]]) -> None:
    """evaluation.png: the scores over steps; losses.png: the curves of log.jsonl. Both in the run's folder."""
    from haste.plotting import LOSSES, plot_losses, plot_scores

    run = config.run
    log = read_log(run / "log.jsonl").lines
    stop = alignment_end(log)
    title = f"{run.name}: {config.num_fid_samples:,} samples a point, {config.describe()}"
    with writing(f"a plot in {run}", "the scores are kept, and the same command plots them"):
        plot_scores(run / "evaluation.png", {run.name: {0: records}}, title=title, stop=stop)
        if any(line.get(name) is not None for line in log for name in LOSSES):
            plot_losses(run / "losses.png", log, title=f"{run.name}: losses", stop=stop)


def records_text(records: Sequence[dict[str, Any]], evaluator: Evaluator) -> str:
    """One row per checkpoint, named by its step or, if it was renamed, its file; then what to make of the numbers."""
    rows = [
        (
            record["checkpoint"] if record["step"] is None else f"{record['step']:,}",
            f"{record['fd']:.3f}",
            f"{record['label_accuracy']:.1%}",
        )
        for record in records
    ]
    return f"{text_table([('step', 'FD', 'label accuracy'), *rows], '>')}\n\n{evaluator.describe_reference()}"
