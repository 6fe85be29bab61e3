"""Which steps of a sampler are computed in full, and which are forecast."""

from __future__ import annotations

from dataclasses import dataclass

from haste.errors import UserError


@dataclass(frozen=True)
class IntervalSchedule:
    """TaylorSeer's schedule (arXiv 2503.06923): the first steps full, from there on one full step every `interval`.

    The interval is counted from the last full step: with first_enhance 2 and interval 4 the full steps are
    0, 1, 5, 9, ... Of 50 steps intervals 3, 4, 5 and 6 leave 18, 14, 11 and 10 full ones, as published.
    """

    interval: int
    first_enhance: int = 2

    def __post_init__(self) -> None:
        for name, value in (("interval", self.interval), ("first_enhance", self.first_enhance)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    def is_full(self, step: int, last_full: int | None) -> bool:
        """Whether `step` is full, when `last_full` was the last full one (None: no history to forecast from).

        A step that began in full stays so: Heun evaluates the model twice in one step.
        """
        if last_full is None or step < self.first_enhance:
            return True
        return step == last_full or step - last_full >= self.interval

    def full_steps(self, num_steps: int) -> list[int]:
        """The full steps of an undisturbed run of num_steps.

        Raises:
            UserError: settings that make no sense for so many steps.
        """
        for name, value in (("interval", self.interval), ("first_enhance", self.first_enhance)):
            if value > num_steps:
                raise UserError(f"{name} is {value}; it must not be above the number of steps, {num_steps}")
        full: list[int] = []
        for step in range(num_steps):
            if self.is_full(step, full[-1] if full else None):
                full.append(step)
        return full
