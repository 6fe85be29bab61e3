"""Every checkpoint of a run on data with a classifier: FD and label accuracy, in <run>/evaluation.jsonl.

Of a run on captions FD, and how often samples show what their prompts ask for, in place of the label accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from haste.distributed import progress_bar
from haste.errors import UserError, require
from haste.evaluation.config import EvaluateConfig
from haste.generation.config import SamplingConfig
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint, run_checkpoints
from haste.generation.pipeline import fit_to_family
from haste.generation.prompts import join_prompts
from haste.generation.sample_dir import open_sampler
from haste.io import writing
from haste.metrics.config import MetricConfig
from haste.metrics.evaluator import TITLES, Evaluator, Result, notes
from haste.metrics.features import PromptReader, extract
from haste.metrics.reference import check_replaceable, save_reference
from haste.registry import EXTRACTORS
from haste.resumable import append_line, read_lines, updating
from haste.tables import NONE, format_number, known_columns, text_table
from haste.training.checkpoint import checkpoint_identity
from haste.training.logging import alignment_end, finite, is_step, read_log

RECORDS = "evaluation.jsonl"
OF_CHECKPOINTS = ("fd", "label_accuracy")
READ = "read"  # in place of the label accuracy where there are prompts: rates by name
SAMPLED_AT_ONCE = 250  # images, when checkpoints are evaluated without a folder of samples
CLASSIFIED_AT_ONCE = 512


def evaluate_by_classifier(config: EvaluateConfig) -> tuple[list[dict[str, Any]], Evaluator]:
    """Compute and plot FD and label accuracy, or what of prompts is read, of every checkpoint of a run.

    Raises:
        UserError.
    """
    config.check()
    if config.labels == "none":
        raise UserError("--labels must be classes with --run, which has the accuracy of labels, got none; --ckpt "
                        "evaluates images of no class")  # fmt: skip
    require("matplotlib")
    run, count = config.trained, config.num_fid_samples
    checkpoints = run_checkpoints(run)
    with writing(str(run / RECORDS)), updating(run / RECORDS):
        pass  # a folder that cannot be written is refused before anything is sampled
    loaded = load_checkpoint(run, config.weights, convention=config.convention)
    name, config = classifier_for(loaded), fit_to_family(config, loaded, config.fast)
    evaluator = load_evaluator(config, name, name, CLASSIFIED_AT_ONCE, count)
    with progress_bar(total=len(checkpoints) * count, unit="image", desc="evaluate") as bar:

        def progress(checkpoint: Path, images: int) -> None:
            bar.set_postfix_str(checkpoint.stem, refresh=False)
            bar.update(images)

        records = evaluate_checkpoints(run, checkpoints, config, count, evaluator, progress)
    plot_run(run, config, records, evaluator)
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

    A model of text is given the prompts of the extractor, if there are no others.
    """
    settings = with_prompts(settings, evaluator)
    if settings.mode is None or settings.time_shift is None:  # records have what they come to
        settings = fit_to_family(settings, load_checkpoint(run, settings.weights, convention=settings.convention))
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


def with_prompts(settings: SamplingConfig, evaluator: Evaluator) -> SamplingConfig:
    """The settings with the prompts that the extractor reads, if it does, and there are no others."""
    reader = evaluator.extractor
    if settings.prompts or not isinstance(reader, PromptReader):
        return settings
    return replace(settings, prompts=join_prompts(reader.prompts, "all"))


def evaluate_checkpoint(
    checkpoint: Path,
    settings: SamplingConfig,
    count: int,
    evaluator: Evaluator,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Sample images from one checkpoint and score them: step, fd, label_accuracy or read, and seconds.

    Raises:
        UserError.
    """
    loaded = load_checkpoint(checkpoint, settings.weights, convention=settings.convention)
    classifier_for(loaded)
    sampler = open_sampler(loaded, settings)
    begin = perf_counter()
    images, labels = sampler.sample_batches(count, SAMPLED_AT_ONCE, progress)
    seconds = perf_counter() - begin
    assert evaluator.extractor is not None
    features = extract(evaluator.extractor, images, evaluator.batch_size)
    captions = sampler.conditions.captions(range(count))
    scores: dict[str, Any]
    if captions is None or not isinstance(evaluator.extractor, PromptReader):
        scores = evaluator.values(features, labels, OF_CHECKPOINTS)
    else:
        scores = {
            **evaluator.values(features, labels, ("fd",)),
            READ: evaluator.extractor.read(images, [text or "" for text in captions]),
        }
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
    measured = ("step", "seconds", READ, *OF_CHECKPOINTS)
    return json.dumps({name: value for name, value in record.items() if name not in measured}, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of an evaluation.jsonl, without damaged lines."""
    return [record for record in read_lines(path)[0] if _is_record(record)]


def _is_record(record: dict[str, Any]) -> bool:
    step = record.get("step")
    return (
        isinstance(record.get("checkpoint"), str)
        and (step is None or is_step(step))
        and finite(record.get("fd")) is not None
        and (finite(record.get("label_accuracy")) is not None or _are_rates(record.get(READ)))
    )


def _are_rates(found: Any) -> bool:
    return isinstance(found, dict) and all(rate is None or finite(rate) is not None for rate in found.values())


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one record, under a lock. UserError if that fails."""
    with writing(str(path), "existing scores are kept, and the same command resumes"), updating(path):
        append_line(path, record, durable=True)


def plot_run(run: Path, config: EvaluateConfig, records: Sequence[dict[str, Any]], evaluator: Evaluator) -> None:
    """Plot the scores over steps to evaluation.png, and the curves of log.jsonl to losses.png, in the run's folder."""
    from haste.plotting import LOSSES, plot_losses, plot_rates, plot_scores

    log = read_log(run / "log.jsonl").lines
    stop = alignment_end(log)
    title = f"{run.name}: {config.num_fid_samples:,} samples a point, {config.describe()}"
    with writing(f"a plot in {run}", "the scores are kept, and the same command plots them"):
        if isinstance(evaluator.extractor, PromptReader):
            plot_rates(run / "evaluation.png", records, evaluator.extractor.rates, title=title, stop=stop)
        else:
            plot_scores(run / "evaluation.png", {run.name: {0: records}}, title=title, stop=stop)
        if any(line.get(name) is not None for line in log for name in LOSSES):
            plot_losses(run / "losses.png", log, title=f"{run.name}: losses", stop=stop)


def records_text(records: Sequence[dict[str, Any]], evaluator: Evaluator) -> str:
    """One row per checkpoint, named by its step or else its file, then how to read the numbers."""
    names = [record["checkpoint"] if record["step"] is None else f"{record['step']:,}" for record in records]
    if isinstance(evaluator.extractor, PromptReader):
        return f"{rates_text(names, records, evaluator.extractor.rates)}\n\n{describe_reference(evaluator)}"
    rows = [
        (name, [Result(key, record[key]) for key in OF_CHECKPOINTS])
        for name, record in zip(names, records, strict=True)
    ]
    return f"{checkpoints_text(rows)}\n\n{describe_reference(evaluator)}"


def rates_text(names: Sequence[str], records: Sequence[dict[str, Any]], rates: Mapping[str, str]) -> str:
    """FD and the rates of each checkpoint, in percent, by their titles; a dash where no prompt asks for it."""
    rows = [["step", "FD", *rates.values()]]
    for name, record in zip(names, records, strict=True):
        shares = (record[READ].get(key) for key in rates)
        rows.append([name, format_number(record["fd"], 3), *(format_number(share, 1, 100.0) for share in shares)])
    return f"{text_table(rows, '>')}\n% of prompts that samples were read to show, by part"


def checkpoints_text(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One row per checkpoint, one column per metric that any of them has, then the notes."""
    keys = [result.key for result in rows[0][1]]
    cells = []
    for name, results in rows:
        by_key = {result.key: str(result) for result in results}
        cells.append([name, *(by_key.get(key, NONE) for key in keys)])
    table = text_table(known_columns(["step", *(TITLES[key] for key in keys)], cells), ">")
    return "\n".join([table, *dict.fromkeys(line for _, results in rows for line in notes(results))])


def describe_reference(evaluator: Evaluator) -> str:
    """How to read scores by a classifier of the data: the split-half FD, and the accuracy of the classifier."""
    extractor, reference = evaluator.extractor, evaluator.reference
    assert extractor is not None
    return (
        f"FD to {reference.count:,} real {reference.name} in {reference.dimension} features of {extractor.describe()}; "
        f"two halves of these have an FD of {evaluator.split_half_fd:.2f}.\n"
        f"The classifier's accuracy on held-out real {reference.name} is {extractor.held_out_accuracy:.1%}."
    )


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
