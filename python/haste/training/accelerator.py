"""The accelerator of a run, with the settings that it takes: precision, trackers, TF32."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from haste.distributed import sharding
from haste.errors import UserError, in_one_line
from haste.training.config import TrainConfig
from haste.training.logging import check_trackers


def make_accelerator(config: TrainConfig) -> Accelerator:
    """UserError for a precision, a tracker or a number of processes that does not work."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    check_trackers(config)
    if sharding() and config.termination == "gradient-cosine":
        raise UserError("--termination must be another rule with FSDP, got gradient-cosine, which needs whole weights")
    if sharding() and config.optimizer == "muon":
        raise UserError("--optimizer must be adamw with FSDP, got muon, which needs whole matrices")
    if sharding() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("--fsdp_version of accelerate launch must be 2, got 1")
    output = Path(config.output_dir).expanduser()
    logs = output / config.logging_dir / config.exp_name  # tensorboard's, one folder for each run
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes would not find each other
            mixed_precision=config.mixed_precision,
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(logs)),
        )
    except ValueError as error:  # a precision that the device lacks, or another than this process has used before
        why = in_one_line(error)
        raise UserError(f"--mixed-precision must work here, got {config.mixed_precision}: {why}") from error
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size must be a multiple of {accelerator.num_processes}, the number of processes, got "
            f"{config.batch_size}"
        )
    return accelerator
