"""Where the log goes besides log.jsonl: tensorboard and wandb, through accelerate."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from haste.errors import UserError, in_one_line
from haste.training.backlog import Backlog
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)

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

    def show(self, image: np.ndarray, step: int) -> None:
        """Hand one image (H, W, 3) uint8 to every tracker, as `previews`. Of several processes the first one does."""
        for tracker in self.accelerator.trackers:
            self._backlog.add(lambda tracker=tracker: show_in(tracker, image, step))

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


def show_in(tracker: GeneralTracker, image: np.ndarray, step: int) -> None:
    """tensorboard must be told where the channels are."""
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    try:
        tracker.log_images({"previews": image[None]}, step=step, **layout)
    except Exception:
        begin_another_file(tracker)
        raise


def begin_another_file(tracker: GeneralTracker) -> None:
    """tensorboard's thread that writes has ended with the first error: let the next record start another one."""
    if tracker.name == "tensorboard":
        tracker.writer.file_writer = tracker.writer.all_writers = None
