"""How a run is spread: the precision, and one process, several with a copy of the student each, or with a share each.

accelerate reads all of this from how the run was launched; what it launches is one of

    python -m haste train ...                                                      one process
    accelerate launch --multi_gpu -m haste train ...                               DDP: a copy each
    accelerate launch --use_fsdp --fsdp_version 2 -m haste train ...               FSDP2: a share each

and for two machines of eight GPUs, on each with its own rank, 0 and 1,

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip 10.0.0.1 --main_process_port 29500 -m haste train ...

where --output-dir is a folder that both see.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from haste.errors import UserError, in_one_line
from haste.models import get_family
from haste.training.config import TrainConfig
from haste.training.logging import check_trackers


def make_accelerator(config: TrainConfig) -> Accelerator:
    """UserError for a precision, a tracker or a number of processes that cannot be had."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    check_trackers(config)
    if sharding() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP version 1 was launched; it must be 2: accelerate launch --fsdp_version 2")
    output = Path(config.output_dir).expanduser()
    logs = output / config.logging_dir / config.exp_name  # tensorboard's, one folder for each run
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes would each believe to be alone
            mixed_precision=config.mixed_precision,
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(logs)),
        )
    except ValueError as error:  # a precision that the device lacks, or another than this process has used before
        raise UserError(
            f"--mixed-precision is {config.mixed_precision}, which does not work here: {in_one_line(error)}"
        ) from error
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size is {config.batch_size}; it must be a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def in_first(accelerator: Accelerator, function: Callable[[], object]) -> None:
    """Call `function` in the first process, while the others wait. After a UserError there, which the first one raises,
    all leave."""
    problem = None
    if accelerator.is_main_process:
        try:
            function()
        except UserError as error:
            problem = error
    failed = torch.tensor(float(problem is not None), device=accelerator.device)
    if accelerator.reduce(failed, reduction="sum") > 0:
        raise problem or SystemExit(2)


def sharding() -> bool:
    """Whether FSDP was asked for."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2: block by block each process keeps its share of the weights, in place.

    The shares stay in fp32 and autocast rounds what a matrix product reads, as in one process.
    """
    # What it warns of, changing an output in place, nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in get_family(model).blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP. Every buffer and every weight starts out the same, as all processes draw from the same seed."""
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward: gradients are exchanged in the last of a step's passes only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a share; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, or all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, shared out as `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
