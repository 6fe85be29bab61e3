"""Scores of pictures and of runs: Fréchet distance to the real digits, and accuracy on the requested label."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from haste.errors import UserError
from haste.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance
from haste.evaluation.judge import Judge, JudgeSettings, load_judge, real_digits
from haste.generation.drawing import Sampler
from haste.generation.filling import measure_full_steps
from haste.generation.settings import SamplingSettings
from haste.generation.student import Student, load_student
from haste.io import told, write_text
from haste.lock import updating
from haste.training.identity import as_before, checkpoint_identity
from haste.training.run_log import finite, is_step, read_lines

RECORDS = "evaluation.jsonl"
BATCH = 250  # pictures drawn at once when a checkpoint is scored


@dataclass(frozen=True)
class Scores:
    """distance: Fréchet distance to all real digits. accuracy: 0 to 1, None if the labels are not known."""

    distance: float
    accuracy: float | None
    samples: int


@dataclass(frozen=True)
class Yardstick:
    """What pictures are held against: the judge, the real digits in its features, and how far apart those are.

    halves: the Fréchet distance between two random halves of the real digits, for scale. It is not a lower bound:
    halves are smaller sets than those that are scored, and the distance of small sets is biased upwards.
    """

    judge: Judge
    real: Gaussian
    halves: float

    def score(self, images: np.ndarray, labels: np.ndarray | None) -> Scores:
        """Score pictures (N, 8, 8, 3) uint8 with the labels (N,) that were asked for, or None."""
        judged = self.judge(images)
        distance = frechet_distance(fit_gaussian(judged.features), self.real)
        return Scores(distance, None if labels is None else judged.accuracy(labels), len(images))


def load_yardstick(cache: Path, settings: JudgeSettings | None = None) -> Yardstick:
    """The judge from the folder `cache`, trained first if it is not there, with the statistics of the real digits."""
    judge = load_judge(cache, settings or JudgeSettings())
    features = judge(real_digits()[0]).features
    order = np.random.default_rng(judge.settings.seed).permutation(len(features))
    first, second = np.array_split(features[order], 2)
    return Yardstick(judge, fit_gaussian(features), frechet_distance(fit_gaussian(first), fit_gaussian(second)))


def evaluate_checkpoints(
    run: Path,
    checkpoints: list[Path],
    settings: SamplingSettings,
    count: int,
    yardstick: Yardstick,
    progress: Callable[[Path, int], None] = lambda checkpoint, pictures: None,
) -> list[dict[str, Any]]:
    """Score checkpoints of one run with `count` pictures each; their records, in the order given.

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
            "judge": yardstick.judge.settings.digest(),
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
    settings: SamplingSettings,
    count: int,
    yardstick: Yardstick,
    progress: Callable[[Path, int], None],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Draw `count` pictures from one checkpoint and score them. Raises UserError if it does not draw digits."""
    student = load_student(checkpoint, settings.ema, convention=settings.convention)
    check_on_digits(student)
    sampler = Sampler(student, settings)
    if settings.max_error:  # as haste sample: the same full steps for all pictures
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


def check_on_digits(student: Student) -> None:
    """UserError for a model that was not trained on the digits, or whose file does not tell on what it was."""
    data = student.config.data_dir
    if data != "digits":
        known = f"was trained on {data!r}" if data else "does not tell what it was trained on"
        raise UserError(f"{student.checkpoint} {known}; the judge knows digits only; give --features and --reference")


def fingerprint(record: dict[str, Any]) -> str:
    """What makes two records answers to the same question, as text."""
    measured = ("step", "distance", "accuracy", "seconds")
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
        and all(finite(record.get(name)) is not None for name in ("distance", "accuracy"))
    )


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line; the file is replaced whole, so that a kill leaves the old lines or the new.

    Another command that does the same waits. UserError if it cannot be written.
    """
    with told(str(path), "the scores that are there are kept, and the same command goes on"), updating(path):
        write_text(path, "".join(json.dumps(line) + "\n" for line in [*read_lines(path)[0], record]))
