"""What the loop measures at every step, kept on the device until somebody wants to read it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.performance import peak_memory_gib, peak_teraflops, training_flops

logger = logging.getLogger(__name__)

# As REPA and HASTE log them: `loss` is the velocity loss alone. total_loss is what the gradient is of.
METRICS = ("loss", "proj_loss", "attn_loss", "total_loss", "grad_norm")

# The names of logs from before that, whose `loss` was the total.
FORMER_METRICS = ("velocity_loss", "feature_loss", "attention_loss", "loss", "grad_norm")


def with_present_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of log.jsonl, with the former names of its losses replaced by METRICS."""
    if FORMER_METRICS[0] not in record:
        return record
    losses = {name: record.get(former) for name, former in zip(METRICS, FORMER_METRICS, strict=True)}
    return {name: value for name, value in record.items() if name not in FORMER_METRICS} | losses


class Meter:
    """Collects METRICS step by step, the means over a step's passes; only `read` waits for the device."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, model_config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.batch_size = config.batch_size * config.gradient_accumulation_steps
        self.skip = config.on_nan == "skip"
        # Under fp16 an infinite gradient is no error: the scaler skips that step.
        watched = ("total_loss", "grad_norm") if accelerator.scaler is None else ("total_loss",)
        self.watched = [METRICS.index(name) for name in watched]
        self.flops = training_flops(model_config)
        peak = peak_teraflops(accelerator.device, config.mixed_precision)
        self.peak = None if peak is None else peak * accelerator.num_processes
        self._passes: list[Tensor] = []
        self._rows: list[Tensor] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Count the time from now on, when no step has been added since the last reading."""
        self._start = time.perf_counter()

    def add(self, velocity: Tensor, feature: Tensor | None, attention: Tensor | None, total: Tensor) -> None:
        """The scalars of one pass; None for a loss that is off."""
        off = total.new_tensor(math.nan)
        values = (velocity, feature, attention, total)
        self._passes.append(torch.stack([off if value is None else value.detach().float() for value in values]))

    def add_norm(self, grad_norm: Tensor) -> None:
        """The length of the gradient, which ends a step."""
        self._rows.append(torch.cat([torch.stack(self._passes).mean(dim=0), grad_norm.detach().float().view(1)]))
        self._passes = []

    def read(self, step: int) -> dict[str, float | None] | None:
        """The means since the last time over all processes, and what the steps took; None if no step was made.

        teraflops: of the student, in 10^12 a second. mfu: the share of what the devices could do, None if not known.
        peak_memory_gib: of this process, since it began.

        step: steps made so far. Every process must ask. Raises UserError, naming the first step whose loss or gradient
        is not finite; where such steps are skipped, only if there was no other since the last time.
        """
        if not self._rows:
            return None
        rows = self.accelerator.reduce(torch.stack(self._rows), reduction="mean").tolist()
        bad = self._not_finite(rows, step)
        good = [row for row in rows if all(math.isfinite(row[index]) for index in self.watched)]
        seconds = time.perf_counter() - self._start
        means = {name: mean_of_finite([row[column] for row in good]) for column, name in enumerate(METRICS)}
        speed = len(rows) * self.batch_size / seconds
        self._rows = []
        self.start_clock()
        teraflops = speed * self.flops / 1e12
        return {
            **means,
            "skipped_steps": len(bad),
            "images_per_second": speed,
            "teraflops": teraflops,
            "mfu": None if self.peak is None else teraflops / self.peak,
            "peak_memory_gib": peak_memory_gib(self.accelerator.device),
        }

    def _not_finite(self, rows: list[list[float]], step: int) -> list[int]:
        """The steps that must be left out; UserError if that is not wanted, or leaves none."""
        bad = {
            number: row
            for number, row in enumerate(rows, start=step - len(rows) + 1)
            if not all(math.isfinite(row[index]) for index in self.watched)
        }
        if not bad:
            return []
        number, row = next(iter(bad.items()))
        total, norm = row[METRICS.index("total_loss")], row[METRICS.index("grad_norm")]
        what = f"the loss or its gradient is not finite at step {number} (loss {total}, gradient {norm})"
        if not self.skip:
            raise UserError(
                f"{what}; training stopped, and the last checkpoint is from before that: a lower --learning-rate may "
                "help, --on-nan skip would leave such steps out"
            )
        if len(bad) == len(rows) > 1:
            raise UserError(f"{what}, nor at any of the {len(rows)} steps from there on; training stopped")
        logger.warning("%s; left out %s", what, ", ".join(f"step {number}" for number in bad))
        return list(bad)


def mean_of_finite(values: Sequence[float]) -> float | None:
    """None if there is none, as for a loss that is off."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
