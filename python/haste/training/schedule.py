"""The learning rate of each step: a linear warmup, a constant, and half a cosine or a line at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from haste.errors import UserError

if TYPE_CHECKING:
    from haste.training.config import TrainConfig


@dataclass(frozen=True)
class LearningRate:
    """A function of the step alone, so that a resumed run continues it.

        step < warmup                rate · (step + 1) / warmup
        step ≥ length − decay        minimum + (rate − minimum) · ½(1 + cos π·p),  p = (step − length + decay) / decay
                                     or of shape linear: minimum + (rate − minimum) · (1 − p)
        else                         rate

    With the cosine it is xAR's schedule (arXiv 2502.20388): an eighth of the run, then constant, and the last quarter.

    Attributes:
        rate: the constant.
        minimum: towards which the cosine falls.
        warmup, decay: numbers of steps.
        length: steps of the run.
        shape: "cosine" or "linear".
    """

    rate: float
    minimum: float
    warmup: int
    decay: int
    length: int
    shape: str = "cosine"

    @classmethod
    def of_run(cls, config: TrainConfig, length: int) -> LearningRate:
        """The schedule of a run of this many steps.

        Raises:
            UserError: warmup and decay together are longer than the run.
        """
        warmup, decay = (_steps(share, length) for share in (config.warmup_steps, config.decay_steps))
        if warmup + decay > length:
            raise UserError(
                f"--warmup-steps and --decay-steps must fit into the {length:,} steps of the run, got {warmup:,} and "
                f"{decay:,}; values below 1 are shares of the run"
            )
        return cls(config.learning_rate, config.min_learning_rate, warmup, decay, length, config.decay_shape)

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        left = self.length - step
        if not self.decay or left > self.decay:
            return self.rate * min(1.0, (step + 1) / max(1, self.warmup))
        progress = 1 - left / self.decay
        share = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.minimum + (self.rate - self.minimum) * share

    def differs(self, other: LearningRate) -> bool:
        """Whether any step has another rate; the length alone changes nothing where there is no decay."""
        return self != (other if self.decay else replace(other, length=self.length, minimum=self.minimum))

    def __str__(self) -> str:
        parts = [f"warmup {self.warmup:,} steps"] * bool(self.warmup)
        shape = "linear " if self.shape == "linear" else ""
        parts += [f"{shape}decay to {self.minimum:g} in the last {self.decay:,}"] * bool(self.decay)
        return f"learning rate {self.rate:g}" + "".join(f", {part}" for part in parts)


def check_schedule(config: TrainConfig) -> None:
    """Raise UserError, naming the flag, for settings of the learning rate that no run of any length can have."""
    for name in ("warmup_steps", "decay_steps"):
        value = getattr(config, name)
        if value >= 1 and value != int(value):
            raise UserError(
                f"--{name.replace('_', '-')} must be a number of steps, or a share of the run below 1, got {value:g}"
            )
    if config.min_learning_rate > config.learning_rate:
        raise UserError(
            f"--min-learning-rate must be at most --learning-rate, {config.learning_rate:g}, got "
            f"{config.min_learning_rate:g}"
        )
    if config.decay_shape != "cosine" and not config.decay_steps:
        raise UserError(f"--decay-steps must be above 0 with --decay-shape {config.decay_shape}, got 0")
    if config.min_learning_rate and not config.decay_steps:
        raise UserError("--decay-steps must be above 0 with --min-learning-rate, which is reached at their end, got 0")


def _steps(value: float, length: int) -> int:
    """A number of steps, or a share of the run."""
    return int(value * length) if value < 1 else int(value)
