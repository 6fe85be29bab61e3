"""Where the log goes besides log.jsonl: tensorboard and wandb, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from haste.errors import UserError
from haste.training.config import TrainConfig

PROJECT = "haste"


def check_trackers(config: TrainConfig) -> None:
    """UserError if --report-to names a package that is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to is {config.report_to}, and {name} is not installed; pip install {name}, "
                "or --report-to none (log.jsonl is always written)"
            )


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Name the run in every tracker, with its settings."""
    if config.trackers:
        settings = {name: "" if value is None else value for name, value in asdict(config).items()}
        accelerator.init_trackers(PROJECT, config=settings, init_kwargs={"wandb": {"name": config.exp_name}})


def track(accelerator: Accelerator, record: Mapping[str, Any], step: int) -> None:
    """Hand one record of the log to every tracker; what has no number in this step is left out."""
    values = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
    accelerator.log(values, step=step)
