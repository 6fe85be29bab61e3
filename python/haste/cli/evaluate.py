"""Carries out `haste evaluate`: draws what is evaluated, evaluates it, and prints and keeps the numbers."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from haste.caching.config import CacheConfig
from haste.cli.flags.evaluate import FULL, Args, sample_args
from haste.distributed import progress_bar
from haste.errors import UserError
from haste.evaluation.evaluate import (
    Bar,
    Evaluation,
    Evaluator,
    MetricConfig,
    Yardstick,
    beside,
    check_on_digits,
    evaluate_checkpoints,
    keep_evaluation,
    load_yardstick,
    metrics_record,
)
from haste.evaluation.fidelity import compare_sets, step_errors, summarise_steps
from haste.evaluation.image_readers import open_images
from haste.evaluation.metrics import check_sample_size
from haste.evaluation.reference import STORED, check_replaceable, save_reference
from haste.evaluation.tables import checkpoints_text, fidelity_text, results_text, steps_text
from haste.generation import sample_dir
from haste.generation.checkpoint import load_checkpoint, run_checkpoints
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler
from haste.generation.sample_dir import read_record
from haste.io import writing
from haste.training.logging import alignment_end, read_log

STEP_IMAGES = 64  # whose states are compared after every step


def main(args: Args) -> None:
    """Judge, and print a table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.run is None:
        evaluate_samples(args)
    elif {args.features, args.reference} <= {None, "digits"}:
        print_records(*evaluate(args))
    else:
        evaluate_run(args)


# ---- any images, all metrics ----


def evaluate_samples(args: Args) -> None:
    """Every metric of one set of images; with a baseline, how far they are from it."""
    open_what_is_there(args)
    evaluator = open_evaluator(args)
    samples = args.samples or draw(args)
    if evaluator is not None:
        evaluation = evaluator.measure(samples, drawn(args))
        print(f"\n{heading(samples, evaluation)}\n\n{results_text(evaluation.results)}")
        if evaluator.on_digits:
            print(yardstick_text(load_yardstick(classifier_dir(args))))
        keep(samples, evaluation.settings, {"metrics": metrics_record(evaluation.results)})
    if args.baseline is not None:
        compare_with_baseline(args, samples)
    print(f"\nkept in  {beside(samples, 'evaluation.json')}")


def open_what_is_there(args: Args) -> None:
    """UserError for images that were drawn before and cannot be used: the real side may take hours to read."""
    if args.samples is not None and args.features != STORED:
        open_images(args.samples, "--samples")
    if args.baseline not in (None, FULL):
        open_images(Path(args.baseline), "--baseline")


def evaluate_run(args: Args) -> None:
    """Every metric of every checkpoint of a run, one row each."""
    checkpoints = run_checkpoints(args.run)
    evaluator = open_evaluator(args)
    rows = []
    for checkpoint in checkpoints:
        samples = draw(replace(args, run=None, ckpt=checkpoint))
        evaluation = evaluator.measure(samples, args.num_fid_samples)
        keep(samples, evaluation.settings, {"metrics": metrics_record(evaluation.results)})
        rows.append((checkpoint.stem, evaluation.results))
    print(f"\n{heading(args.run, evaluation)}\n\n{checkpoints_text(rows)}")


def open_evaluator(args: Args) -> Evaluator | None:
    """The network and the reference that the flags name; None if a comparison with a baseline alone is asked for."""
    features = args.features or ("digits" if on_digits(args) else None)
    if features is None and args.reference is None and args.baseline is not None:
        return None
    if features is None:
        raise UserError("--features is not given; for other images than the digits it must be inception:PATH, a "
                        "teacher's name or folder such as dinov2-vit-l, or stored")  # fmt: skip
    reference = args.reference or ("digits" if features == "digits" else None)
    if reference is None:
        raise UserError(f"--reference is not given; --features {features} needs a folder of real images, or an .npz "
                        "of images or statistics")  # fmt: skip
    if args.save_reference is not None:
        check_replaceable(args.save_reference)
    settings = MetricConfig(kid_subset_size=args.kid_subset_size)
    evaluator = Evaluator(features, reference, classifier_dir(args), args.per_proc_batch_size, settings)
    if args.save_reference is not None:
        save_reference(args.save_reference, evaluator.reference)
    return evaluator


def on_digits(args: Args) -> bool:
    """Whether the images are digits: of a run on them, or as small as they are."""
    if args.samples is None:
        return load_checkpoint(args.run or args.ckpt, args.ema, convention=args.convention).config.data_dir == "digits"
    return open_images(args.samples, "--samples").shape == (8, 8, 3)


def classifier_dir(args: Args) -> Path:
    """As given, or beside the run, or beside the samples."""
    if args.classifier_dir is not None:
        return args.classifier_dir
    place = (args.samples or args.run or args.ckpt).resolve()
    if args.ckpt is not None and place.parent.name == "checkpoints":
        place = place.parents[1]
    return place.parent / "classifier"


def draw(args: Args) -> Path:
    """The folder of the images of --ckpt; those that are there already are not drawn again."""
    return sample_dir.sample_to_folder(sample_args(args)).folder.path


def drawn(args: Args) -> int | None:
    """How many images of a folder were asked for: it may hold more, of another command. None: all."""
    return None if args.samples is not None else args.num_fid_samples


def compare_with_baseline(args: Args, samples: Path) -> None:
    """PSNR and SSIM to the baseline; of one that is sampled here, also the error of every step's state."""
    baseline = (
        draw(replace(args, baseline=None, **asdict(CacheConfig()))) if args.baseline == FULL else Path(args.baseline)
    )
    with Bar("baselines") as bar:
        fidelity = compare_sets(samples, baseline, bar.advance, drawn(args)).summary()
    print(f"\n{samples.name} beside {baseline.name}, {fidelity['images']:,} images\n\n{fidelity_text(fidelity)}")
    measured = {"fidelity": fidelity}
    if args.baseline == FULL:
        errors = compare_steps(args, samples)
        print(steps_text(errors))
        measured["step_errors"] = summarise_steps(errors)
    keep(samples, {"samples": samples.name, "baseline": baseline.name, "count": fidelity["images"]}, measured)


def compare_steps(args: Args, samples: Path) -> np.ndarray:
    """The relative errors (steps, images) of the first images' states, drawn as these samples were, and a plot."""
    from haste.plotting import plot_step_errors

    settings = SamplingConfig(**{field.name: getattr(args, field.name) for field in fields(SamplingConfig)})
    student = load_checkpoint(args.ckpt, args.ema, convention=args.convention)
    cached, full = Sampler(student, settings), Sampler(student, replace(settings, **asdict(CacheConfig())))
    full_steps = read_record(samples).full_steps
    if full_steps is not None:  # that --error-threshold has found
        cached = cached.with_full_steps(full_steps)
    errors = step_errors(cached, full, range(min(args.num_fid_samples, STEP_IMAGES)))
    title = f"{student.label}\n{settings.describe()}"
    plot = beside(samples, "step-errors.png")
    with writing(str(plot)):
        plot_step_errors(plot, errors, title=title, full_steps=cached.cache.full_steps)
    return errors


def keep(samples: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Write evaluation.json beside the samples; UserError if that folder cannot be written."""
    keep_evaluation(beside(samples, "evaluation.json"), settings, measured)


def heading(samples: Path, evaluation: Evaluation) -> str:
    """What was compared with what, in which features."""
    settings = evaluation.settings
    count = settings["reference_count"]
    real = "statistics of real images" if count is None else f"{count:,} real images"
    return (
        f"{samples.name}: {settings['count']:,} samples against {real} ({settings['reference']}), "
        f"{settings['dimension']:,} features of {settings['network']}"
    )


# ---- the checkpoints of a run on the digits ----


def evaluate(args: Args) -> tuple[list[dict], Yardstick]:
    """Judge the checkpoints that --run names by the digits; their records, and what they were held against."""
    args.check()
    checkpoints = run_checkpoints(args.run)
    check_on_digits(
        load_checkpoint(args.run, args.ema, convention=args.convention)
    )  # before a classifier is trained for it
    yardstick = load_yardstick(classifier_dir(args))
    sentence = check_sample_size(args.num_fid_samples, yardstick.real.dimension)
    if sentence:
        print(sentence)
    records = evaluate_under_bar(args, args.run, checkpoints, yardstick)
    draw_images(args, args.run, records)
    return records, yardstick


def evaluate_under_bar(args: Args, run: Path, checkpoints: list[Path], yardstick: Yardstick) -> list[dict]:
    """evaluate_checkpoints with a progress bar over all images of all checkpoints."""
    with progress_bar(total=len(checkpoints) * args.num_fid_samples, unit="image", desc="evaluate") as bar:

        def progress(checkpoint: Path, images: int) -> None:
            bar.set_postfix_str(checkpoint.stem, refresh=False)
            bar.update(images)

        return evaluate_checkpoints(run, checkpoints, args, args.num_fid_samples, yardstick, progress)


def draw_images(args: Args, run: Path, records: list[dict]) -> None:
    """evaluation.png: the scores over steps; losses.png: the curves of log.jsonl. Both in the run's folder."""
    from haste.plotting import LOSSES, plot_losses, plot_scores

    log = read_log(run / "log.jsonl").lines
    stop = alignment_end(log)
    title = f"{run.name}: {args.num_fid_samples:,} samples a point, {args.describe()}"
    with writing(f"a plot in {run}", "the scores are kept, and the same command draws it"):
        plot_scores(run / "evaluation.png", {run.name: {0: records}}, title=title, stop=stop)
        if any(line.get(name) is not None for line in log for name in LOSSES):
            plot_losses(run / "losses.png", log, title=f"{run.name}: losses", stop=stop)


def print_records(records: list[dict], yardstick: Yardstick) -> None:
    """Print the table of a run: one row per checkpoint, named by its step or, if it was renamed, its file."""
    names = [record["checkpoint"] if record["step"] is None else f"{record['step']:,}" for record in records]
    width = max(map(len, ["step", *names]))
    print(f"\n{'step':>{width}}  {'fd':>9}  {'label_accuracy':>8}")
    for name, record in zip(names, records, strict=True):
        print(f"{name:>{width}}  {record['fd']:9.3f}  {record['label_accuracy']:8.1%}")
    print(f"\n{yardstick_text(yardstick)}")


def yardstick_text(yardstick: Yardstick) -> str:
    """What to make of a distance and an accuracy on the digits."""
    return (
        f"Fréchet distance to {yardstick.real.count:,} real digits in {yardstick.real.dimension} features "
        f"of the classifier; two halves of the real digits are {yardstick.halves:.2f} apart.\n"
        f"The classifier reads {yardstick.classifier.held_out_accuracy:.1%} of the real digits that it has not seen."
    )
