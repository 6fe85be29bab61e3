"""What a run logs: its metrics, to log.jsonl and to tensorboard and wandb; and its log as others read it."""

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.models import get_family
from haste.resumable import read_lines
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)

# Dense 16-bit matrix products per second, in units of 10^12, from NVIDIA's data sheets; the first name that fits.
PEAK_TERAFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165,
}  # fmt: skip


def peak_teraflops(device: torch.device, precision: str) -> float | None:
    """Of one device; None where it is not known, or where products are not 16-bit."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TERAFLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held at any time: on its GPU, or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # which Linux counts in KiB


class Backlog:
    """Writes in their order that a run can do without for a while: a full disk costs no training.

    One that fails waits in memory, and so do those after it; all are tried again with the next. The first failure is
    logged, and when all are written.

    what: names what is written, for the messages. errors: what a write may raise.
    """

    def __init__(self, what: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError) -> None:
        self.what = what
        self.errors = errors
        self._waiting: deque[Callable[[], None]] = deque()
        self._failing = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, write: Callable[[], None]) -> None:
        """Write now, after all that wait; or keep it for later."""
        self._waiting.append(write)
        self.flush()

    def flush(self) -> None:
        """Try what waits."""
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
        except self.errors as error:
            if not self._failing:
                logger.error("%s cannot be written, and training goes on: %s; it is tried again", self.what, error)
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


LARGEST_STEP = 2**53  # above, floats leave steps out
LARGEST_VALUE = 1e30  # no loss that can be shown beside others


class Log(NamedTuple):
    """lines: in the order of their steps, the last of each step. damaged: how many others could not be read."""

    lines: list[dict[str, Any]]
    damaged: int


def read_log(path: Path) -> Log:
    """The lines of a log.jsonl, in today's names; none if there is no file. A last line cut short is no damage.

    Raises UserError if the file cannot be read.
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
    """The step after which a log knows no alignment any more; None if it never had one or never ended it."""
    aligned = [line["step"] for line in lines if line["aligned"]]
    return aligned[-1] if aligned and aligned[-1] < lines[-1]["step"] else None


def is_step(value: Any) -> bool:
    """Whether a value from a file can be a training step."""
    return type(value) is int and 0 <= value < LARGEST_STEP


def finite(value: Any) -> float | None:
    """A value from a file as a number that can be shown; None for anything else."""
    if type(value) not in (int, float) or not abs(value) < LARGEST_VALUE:  # NaN is not below anything
        return None
    return float(value)


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    record = with_present_names(record)
    numbers = {name: finite(value) for name, value in record.items() if name not in ("step", "aligned")}
    return {"step": record["step"], "aligned": record.get("aligned") is True, **numbers}


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


class Metrics:
    """METRICS step by step, the means over a step's micro-batches, on the device; only `read` waits for it."""

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
        """Count the time from now on, when no step has been added since the last reading."""
        self._start = time.perf_counter()

    def add(self, velocity: Tensor, feature: Tensor | None, attention: Tensor | None, total: Tensor) -> None:
        """The losses of one micro-batch; None for one that is off."""
        off = total.new_tensor(math.nan)
        values = (velocity, feature, attention, total)
        self._micro_batches.append(torch.stack([off if value is None else value.detach().float() for value in values]))

    def add_norm(self, grad_norm: Tensor) -> None:
        """The norm of the gradient, which ends a step."""
        self._rows.append(torch.cat([torch.stack(self._micro_batches).mean(dim=0), grad_norm.detach().float().view(1)]))
        self._micro_batches = []

    def read(self, step: int) -> dict[str, float | None] | None:
        """The means since the last time over all processes, and what the steps took; None if no step was done.

        teraflops: of the model, in 10^12 a second. mfu: the share of what the devices could do, None if not known.
        peak_memory_gib: of this process, since it began.

        step: steps done. Every process must call it. Raises UserError, naming the first step whose loss or gradient
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
        teraflops = None if self.flops is None else speed * self.flops / 1e12
        return {
            **means,
            "skipped_steps": len(bad),
            "images_per_second": speed,
            "teraflops": teraflops,
            "mfu": None if None in (teraflops, self.peak) else teraflops / self.peak,
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


PROJECT = "haste"  # unless wandb's own WANDB_PROJECT names another


def check_trackers(config: TrainConfig) -> None:
    """UserError if --report-to names a package that is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to is {config.report_to}, and {name} is not installed; pip install {name}, "
                "or --report-to none (log.jsonl is always written)"
            )


class Trackers:
    """Those of --report-to. One that fails, for a full disk or a lost network, costs no training: what it has missed
    waits in memory, and is handed over when it works again."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._backlog = Backlog("the log of --report-to", errors=Exception)  # each tracker has errors of its own

    def start(self, config: TrainConfig) -> None:
        """Name the run in every tracker, with its settings. UserError if one cannot be started."""
        if not config.trackers:
            return
        settings = {name: "" if value is None else value for name, value in asdict(config).items()}
        named = {"wandb": {"name": config.exp_name}}
        try:
            self.accelerator.init_trackers(project(config), config=settings, init_kwargs=named)
        except Exception as error:  # each tracker has errors of its own, here and below
            raise UserError(f"--report-to is {config.report_to}, which cannot start: {in_one_line(error)}") from error

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Hand one record of the log to every tracker; what has no number in this step is left out."""
        values = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
        if self.accelerator.trackers:
            self._backlog.add(lambda: self._write(values, step))

    def log_image(self, image: np.ndarray, step: int) -> None:
        """Hand one image (H, W, 3) uint8 to every tracker, as `samples`. Of several processes the first one does."""
        for tracker in self.accelerator.trackers:
            self._backlog.add(lambda tracker=tracker: log_image(tracker, image, step))

    def _write(self, values: dict[str, float], step: int) -> None:
        try:
            self.accelerator.log(values, step=step)
        except Exception:
            for tracker in self.accelerator.trackers:
                begin_another_file(tracker)
            raise

    def close(self) -> None:
        """End every tracker and the group of processes."""
        if self.accelerator.trackers:
            self._backlog.close()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                logger.error("%s could not write its last entries: %s", tracker.name, in_one_line(error))
        self.accelerator.trackers = []
        self.accelerator.end_training()


def project(config: TrainConfig) -> str:
    """The project in which trackers file the run."""
    return (os.environ.get("WANDB_PROJECT") if "wandb" in config.trackers else None) or PROJECT


def log_image(tracker: GeneralTracker, image: np.ndarray, step: int) -> None:
    """tensorboard must be told where the channels are."""
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    try:
        tracker.log_images({"samples": image[None]}, step=step, **layout)
    except Exception:
        begin_another_file(tracker)
        raise


def begin_another_file(tracker: GeneralTracker) -> None:
    """tensorboard's thread that writes has ended with the first error: let the next record start another one."""
    if tracker.name == "tensorboard":
        tracker.writer.file_writer = tracker.writer.all_writers = None
