"""Logging of a run: its metrics, in log.jsonl, tensorboard and wandb; and reading a log.jsonl."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.models import get_family
from haste.resumable import read_lines
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)

# Under REPA's and HASTE's names: `loss` is the family's own, of velocity or noise, and the gradient is total_loss's.
# Earlier versions used other names.
METRICS = ("loss", "proj_loss", "attn_loss", "disp_loss", "cls_loss", "sra_loss", "total_loss", "grad_norm")
FORMER_METRICS = {
    "velocity_loss": "loss", "feature_loss": "proj_loss", "attention_loss": "attn_loss", "loss": "total_loss",
    "grad_norm": "grad_norm",
}  # fmt: skip


# ---- reading a log ----

LARGEST_STEP = 2**53  # above, floats leave steps out
LARGEST_VALUE = 1e30  # losses above this cannot be plotted beside others


class Log(NamedTuple):
    """The lines of a log in the order of their steps, the last of each step, and the number of unreadable lines."""

    lines: list[dict[str, Any]]
    damaged: int


def read_log(path: Path) -> Log:
    """Read a log.jsonl, under METRICS' names; empty if the file does not exist.

    An incomplete last line does not count as damaged.

    Raises:
        UserError: the file cannot be read.
    """
    records, damaged = read_lines(path)
    lines: dict[int, dict[str, Any]] = {}
    for record in records:
        if is_step(record.get("step")):
            lines[record["step"]] = _clean(record)
        else:
            damaged += 1
    return Log([lines[step] for step in sorted(lines)], damaged)


def alignment_end(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """The last logged step with alignment; None for a log without alignment, or with alignment to its end."""
    aligned = [line["step"] for line in lines if line["aligned"]]
    return aligned[-1] if aligned and aligned[-1] < lines[-1]["step"] else None


def is_step(value: Any) -> bool:
    """Whether a value from a file is a training step."""
    return type(value) is int and 0 <= value < LARGEST_STEP


def finite(value: Any) -> float | None:
    """A value from a file, if it is a number that can be plotted; else None."""
    if type(value) not in (int, float) or not abs(value) < LARGEST_VALUE:  # NaN is not below anything
        return None
    return float(value)


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    record = with_present_names(record)
    numbers = {name: finite(value) for name, value in record.items() if name not in ("step", "aligned")}
    return {"step": record["step"], "aligned": record.get("aligned") is True, **numbers}


def with_present_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of log.jsonl, with METRICS in place of FORMER_METRICS."""
    if "velocity_loss" not in record:
        return record
    losses = {name: record.get(former) for former, name in FORMER_METRICS.items()}
    return {name: value for name, value in record.items() if name not in FORMER_METRICS} | losses


# ---- metrics ----

# Dense 16-bit matrix products in 10^12 FLOP/s, from NVIDIA's data sheets. The first name that fits counts.
PEAK_TERAFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165,
}  # fmt: skip


def peak_teraflops(device: torch.device, precision: str) -> float | None:
    """The peak of one device; None if it is not known, or if products are not 16-bit."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TERAFLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process, on its GPU or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class Metrics:
    """METRICS of each step, on the device: means over the micro-batches. Only `read` waits for the device."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, model_config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.batch_size = config.batch_size * config.gradient_accumulation_steps
        self.skip = config.on_nan == "skip"
        # Under fp16 an infinite gradient is no error: the scaler skips that step.
        watched = ("total_loss", "grad_norm") if accelerator.scaler is None else ("total_loss",)
        self.watched = [METRICS.index(name) for name in watched]
        self.flops = get_family(model_config).training_flops(model_config)
        peak = peak_teraflops(accelerator.device, config.mixed_precision)
        self.peak = None if peak is None else peak * accelerator.num_processes
        self._micro_batches: list[Tensor] = []
        self._rows: list[Tensor] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Measure time from now on. To be called when no step has been added since the last `read`."""
        self._start = time.perf_counter()

    def add(
        self,
        own: Tensor,
        feature: Tensor | None,
        attention: Tensor | None,
        total: Tensor,
        dispersive: Tensor | None = None,
        class_token: Tensor | None = None,
        itself: Tensor | None = None,
    ) -> None:
        """Add the losses of a micro-batch; None for one that is off."""
        off = total.new_tensor(math.nan)
        values = (own, feature, attention, dispersive, class_token, itself, total)
        self._micro_batches.append(torch.stack([off if value is None else value.detach().float() for value in values]))

    def add_norm(self, grad_norm: Tensor) -> None:
        """Add the gradient norm, which ends a step."""
        self._rows.append(torch.cat([torch.stack(self._micro_batches).mean(dim=0), grad_norm.detach().float().view(1)]))
        self._micro_batches = []

    def read(self, step: int) -> dict[str, float | None] | None:
        """Means over the steps since the last `read` and over all processes. Every process must call it.

        Args:
            step: steps done.

        Returns:
            METRICS, skipped_steps, images_per_second, teraflops (of the model, 10^12 FLOP/s), mfu (share of the
            devices' peak, or None), peak_memory_gib (of this process). None if no step was done.

        Raises:
            UserError: a loss or gradient that is not finite; with --on-nan skip, only if there was no other step.
        """
        if not self._rows:
            return None
        rows = self.accelerator.reduce(torch.stack(self._rows), reduction="mean").tolist()
        bad = self._not_finite(rows, step)
        good = [row for row in rows if self._is_finite(row)]
        speed = len(rows) * self.batch_size / (time.perf_counter() - self._start)
        self._rows = []
        self.start_clock()
        teraflops = None if self.flops is None else speed * self.flops / 1e12
        return {
            **{name: mean_of_finite([row[column] for row in good]) for column, name in enumerate(METRICS)},
            "skipped_steps": len(bad),
            "images_per_second": speed,
            "teraflops": teraflops,
            "mfu": None if teraflops is None or self.peak is None else teraflops / self.peak,
            "peak_memory_gib": peak_memory_gib(self.accelerator.device),
        }

    def _is_finite(self, row: list[float]) -> bool:
        return all(math.isfinite(row[index]) for index in self.watched)

    def _not_finite(self, rows: list[list[float]], step: int) -> list[int]:
        """The steps to skip. UserError with --on-nan stop, or if all must be skipped."""
        first = step - len(rows) + 1
        bad = [number for number, row in enumerate(rows, start=first) if not self._is_finite(row)]
        if not bad:
            return []
        row = dict(zip(METRICS, rows[bad[0] - first], strict=True))
        what = (
            f"the loss or its gradient is not finite at step {bad[0]} (loss {row['total_loss']}, gradient "
            f"{row['grad_norm']})"
        )
        if not self.skip:
            raise UserError(
                f"{what}; training stopped, and the last checkpoint is from before that: try a lower --learning-rate, "
                "or --on-nan skip"
            )
        if len(bad) == len(rows) > 1:
            raise UserError(f"{what}, nor at any of the {len(rows)} steps from there on; training stopped")
        logger.warning("%s; skipped %s", what, ", ".join(f"step {number}" for number in bad))
        return bad


def mean_of_finite(values: Sequence[float]) -> float | None:
    """The mean of the finite values; None if there are none, as for a loss that is off."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


# ---- where it goes ----


class Backlog:
    """Writes, in their order, that are retried when they fail, so that a full disk does not stop training.

    A write that fails waits in memory with those after it until the next one. The first failure is logged, and the
    recovery.

    Args:
        what: name of what is written, for messages.
        errors: the exceptions that a write may raise.
    """

    def __init__(self, what: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError) -> None:
        self.what = what
        self.errors = errors
        self._waiting: deque[Callable[[], None]] = deque()
        self._failing = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, write: Callable[[], None]) -> None:
        """Write after all that wait; if that fails, keep it."""
        self._waiting.append(write)
        self.flush()

    def flush(self) -> None:
        """Try all writes that wait."""
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
        except self.errors as error:
            if not self._failing:
                logger.error("%s cannot be written, and training goes on: %s; it is retried", self.what, error)
            self._failing = True
            return
        if self._failing:
            logger.warning("%s is written again, with what was missing", self.what)
            self._failing = False

    def close(self) -> None:
        """Try a last time, and log what is lost."""
        self.flush()
        if self._waiting:
            logger.error("%s lacks the last %d entries, which could not be written", self.what, len(self._waiting))


def check_trackers(config: TrainConfig) -> None:
    """Raise UserError if --report-to names a package that is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to must name installed packages, got {name}; pip install {name}, or --report-to none "
                "(log.jsonl is always written)"
            )


class Trackers:
    """The trackers of --report-to. What one fails to take, such as for a lost network, is retried."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._backlog = Backlog("the log of --report-to", errors=Exception)  # each tracker has errors of its own

    def start(self, config: TrainConfig) -> None:
        """Start the run in every tracker, with its settings. UserError if one cannot be started."""
        if not config.trackers:
            return
        settings = {name: "" if value is None else value for name, value in asdict(config).items()}
        named = {"wandb": {"name": config.exp_name}}
        try:
            self.accelerator.init_trackers(project(config), config=settings, init_kwargs=named)
        except Exception as error:  # of tensorboard, wandb or the network
            why = in_one_line(error)
            raise UserError(f"--report-to must name trackers that start, got {config.report_to}: {why}") from error

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a record."""
        values = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
        if self.accelerator.trackers:
            self._add(lambda: self.accelerator.log(values, step=step))

    def log_image(self, image: np.ndarray, step: int) -> None:
        """Log an image (H, W, 3) uint8 as `samples`. To be called by the first process."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self._add(partial(tracker.log_images, {"samples": image[None]}, step=step, **layout))

    def _add(self, write: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                write()
            except Exception:  # raised again below
                for tracker in self.accelerator.trackers:
                    if tracker.name == "tensorboard":  # its thread ends with an error; the next record starts another
                        tracker.writer.file_writer = tracker.writer.all_writers = None
                raise

        self._backlog.add(attempt)

    def close(self) -> None:
        """End every tracker and the process group."""
        if self.accelerator.trackers:
            self._backlog.close()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as above; the run itself has ended well
                logger.error("%s could not write its last entries: %s", tracker.name, in_one_line(error))
        self.accelerator.trackers = []
        self.accelerator.end_training()


def project(config: TrainConfig) -> str:
    """The project of the run: "haste", or for wandb its own WANDB_PROJECT."""
    return (os.environ.get("WANDB_PROJECT") if "wandb" in config.trackers else None) or "haste"
