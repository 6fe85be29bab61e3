"""Judge what a model of the digits draws: Fréchet distance to the real digits, and accuracy on the requested digit.

The judge is a small classifier that no training run has seen; it is trained once, in seconds, and kept beside the runs.
Give exactly one of --run (every checkpoint of a run), --ckpt (one checkpoint) or --samples (pictures drawn before).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from haste.errors import UserError
from haste.evaluation.frechet import check_sample_size
from haste.evaluation.images import read_npz, read_pictures
from haste.evaluation.judge import NUM_CLASSES
from haste.evaluation.scores import Yardstick, alignment_end, evaluate_checkpoints, load_yardstick, read_records
from haste.generation.labels import choose_labels
from haste.generation.sample_folder import RECORD, read_record
from haste.generation.settings import SamplingSettings
from haste.generation.student import load_student, run_checkpoints


@dataclass(kw_only=True)
class Args(SamplingSettings):
    """The flags of `haste evaluate`."""

    run: Path | None = None
    """A run's folder: every checkpoint is judged; writes evaluation.jsonl and evaluation.png there."""
    ckpt: Path | None = None
    """A checkpoint file, or a run's folder: then its newest whole checkpoint."""
    samples: Path | None = None
    """A folder of PNGs or an .npz, as `haste sample` leaves them."""
    num_fid_samples: int = 1000
    """How many pictures to draw for each checkpoint."""
    num_steps: int = 25
    """Steps from noise to picture."""
    labels: str = "balanced"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn, such as 3,1,4."""
    judge_dir: Path | None = None
    """Where the judge is kept; by default judge/ beside the runs (for --samples: beside the pictures)."""

    def check(self) -> None:
        super().check()
        given = [name for name in ("run", "ckpt", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in given) or 'nothing'} is given; "
                            "it must be exactly one of --run, --ckpt and --samples")  # fmt: skip
        if self.num_fid_samples < 1:
            raise UserError(f"--num-fid-samples is {self.num_fid_samples}; it must be at least 1")


def main(args: Args) -> None:
    """Judge, and print a table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.check()
    if args.samples is not None:
        yardstick = load_yardstick(args.judge_dir or args.samples.resolve().parent / "judge")
        images, labels = read_samples(args.samples)
        caution(len(images), yardstick)
        scores = yardstick.score(images, labels)
        print_table([(args.samples.name, scores.distance, scores.accuracy)], yardstick)
    else:
        print_records(*evaluate(args))


def evaluate(args: Args) -> tuple[list[dict], Yardstick]:
    """Judge the checkpoints that --run or --ckpt names; their records, and what they were held against."""
    args.check()
    if args.run is not None:
        run, checkpoints = args.run, run_checkpoints(args.run)
    else:
        student = load_student(args.ckpt, args.ema)
        run, checkpoints = student.run, [student.checkpoint]
    yardstick = load_yardstick(args.judge_dir or run.resolve().parent / "judge")
    caution(args.num_fid_samples, yardstick)
    records = evaluate_under_bar(args, run, checkpoints, yardstick)
    if args.run is not None:
        draw_pictures(args, run, records, yardstick)
    return records, yardstick


def evaluate_under_bar(args: Args, run: Path, checkpoints: list[Path], yardstick: Yardstick) -> list[dict]:
    """evaluate_checkpoints with a progress bar over all pictures of all checkpoints."""
    from tqdm import tqdm

    with tqdm(total=len(checkpoints) * args.num_fid_samples, unit="image", desc="evaluate") as bar:

        def progress(checkpoint: Path, pictures: int) -> None:
            bar.set_postfix_str(checkpoint.stem, refresh=False)
            bar.update(pictures)

        return evaluate_checkpoints(run, checkpoints, args, args.num_fid_samples, yardstick, progress)


def draw_pictures(args: Args, run: Path, records: list[dict], yardstick: Yardstick) -> None:
    """evaluation.png: the scores over steps; losses.png: the curves of log.jsonl. Both in the run's folder."""
    from haste.evaluation.pictures import draw_losses, draw_scores  # brings matplotlib

    stop = alignment_end(run)
    title = f"{run.name}: {args.num_fid_samples:,} samples a point, {args.describe()}"
    draw_scores(run / "evaluation.png", {run.name: {0: records}}, title=title, stop=stop)
    log = read_records(run / "log.jsonl")
    if log:
        draw_losses(run / "losses.png", log, title=f"{run.name}: losses", stop=stop)


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures (N, H, W, 3) uint8 of a folder or an .npz, and their labels where these are known."""
    if not path.exists():
        raise UserError(f"--samples is {path}, which does not exist")
    if path.is_file():
        return read_npz(path)
    images = read_pictures(path)
    if not (path / RECORD).is_file():
        return images, None
    settings = read_record(path)["settings"]
    return images, choose_labels(settings["labels"], settings["global_seed"], range(len(images)), NUM_CLASSES)


def print_records(records: list[dict], yardstick: Yardstick) -> None:
    """Print the table of a run: one row per checkpoint, named by its step or, if it was renamed, its file."""
    names = [record["checkpoint"] if record["step"] is None else f"{record['step']:,}" for record in records]
    scores = [(record["distance"], record["accuracy"]) for record in records]
    print_table([(name, *score) for name, score in zip(names, scores, strict=True)], yardstick)


def caution(count: int, yardstick: Yardstick) -> None:
    """Say so when `count` samples are too few for a distance that can be compared; UserError if for any at all."""
    sentence = check_sample_size(count, yardstick.real.dimension)
    if sentence:
        print(sentence)


def print_table(rows: list[tuple[str, float, float | None]], yardstick: Yardstick) -> None:
    """Print name, distance and accuracy, and what to make of them."""
    width = max(len("step"), *(len(name) for name, _, _ in rows))
    print(f"\n{'step':>{width}}  {'distance':>9}  {'accuracy':>8}")
    for name, distance, accuracy in rows:
        print(f"{name:>{width}}  {distance:9.3f}  {'unknown' if accuracy is None else f'{accuracy:8.1%}':>8}")
    print(
        f"\nFréchet distance to {yardstick.real.count:,} real digits in {yardstick.real.dimension} features "
        f"of the judge; two halves of the real digits are {yardstick.halves:.2f} apart.\n"
        f"The judge reads {yardstick.judge.held_out_accuracy:.1%} of the real digits that it has not seen."
    )
