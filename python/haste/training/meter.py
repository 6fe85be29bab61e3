"""What the loop measures at every step, kept on the device until somebody wants to read it."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from haste.errors import UserError

METRICS = ("loss", "velocity_loss", "feature_loss", "attention_loss", "grad_norm")


class Meter:
    """Collects METRICS step by step; only `read` waits for the device.

    batch_size: pictures per step, for the throughput.
    watch_gradient: whether an infinite gradient is an error. Under fp16 it is not: the scaler skips that step.
    """

    def __init__(self, batch_size: int, watch_gradient: bool) -> None:
        self.batch_size = batch_size
        self.watched = (METRICS.index("loss"), METRICS.index("grad_norm"))[: 2 if watch_gradient else 1]
        self._rows: list[Tensor] = []
        self._start = time.perf_counter()

    def add(
        self, loss: Tensor, velocity: Tensor, feature: Tensor | None, attention: Tensor | None, grad_norm: Tensor
    ) -> None:
        """The scalars of one step; None for a loss that is off."""
        off = loss.new_tensor(math.nan)
        values = (loss, velocity, feature, attention, grad_norm)
        self._rows.append(torch.stack([off if value is None else value.detach().float() for value in values]))

    def read(self, step: int) -> dict[str, float | None] | None:
        """The means since the last time, and images_per_second; None if no step was made.

        step: steps made so far. Raises UserError, naming the first step whose loss or gradient is not finite.
        """
        if not self._rows:
            return None
        rows = torch.stack(self._rows).tolist()
        self._check_finite(rows, step)
        seconds = time.perf_counter() - self._start
        means = {name: sum(column) / len(rows) for name, column in zip(METRICS, zip(*rows, strict=True), strict=True)}
        speed = len(rows) * self.batch_size / seconds
        self._rows, self._start = [], time.perf_counter()
        record = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
        return {**record, "images_per_second": speed}

    def _check_finite(self, rows: list[list[float]], step: int) -> None:
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            if not all(math.isfinite(row[index]) for index in self.watched):
                raise UserError(
                    f"the loss or its gradient is not finite at step {number} (loss {row[0]}, gradient {row[-1]}); "
                    "training stopped, and the last checkpoint is from before that: a lower --learning-rate may help"
                )
