"""The processes of a command: how they share a model, how they stop together, and their progress bars.

accelerate reads all of this from how the run was launched; what it launches is one of

    python -m haste train ...                                                      one process
    accelerate launch --multi_gpu -m haste train ...                               DDP: a copy each
    accelerate launch --use_fsdp --fsdp_version 2 -m haste train ...               FSDP2: a shard each

and for two machines of eight GPUs, on each with its own rank, 0 and 1,

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip 10.0.0.1 --main_process_port 29500 -m haste train ...

where --output-dir is a folder that both see.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from haste.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm


class StopRequest:
    """While this context is open, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Several processes must stop after the same step, and each may hear at another one, or alone. So they vote at every
    step, on the CPU and a step late: nobody waits for a vote that is still on its way. A second signal is noted there
    like the first: launchers pass on to their processes what these have received already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._voters = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._ballot = torch.zeros((), dtype=torch.int64)
        self._vote: dist.Work | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other thread
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._vote is not None and kind is None:
            self._vote.wait()  # no process leaves while another counts on its vote
        self._restore()

    def poll(self) -> signal.Signals | None:
        """The signal on account of which to stop, if any; the same in every process. To be called once a step."""
        if self._voters is None:
            return self.received
        decided = 0
        if self._vote is not None:
            self._vote.wait()
            decided = int(self._ballot)
        self._ballot = torch.tensor(self.received or 0)
        self._vote = dist.all_reduce(self._ballot, dist.ReduceOp.MAX, group=self._voters, async_op=True)
        return signal.Signals(decided) if decided else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._voters is None:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


Result = TypeVar("Result")

# A process that has nothing left to sample waits for the others' last batch, which may take hours on a CPU.
PATIENCE = timedelta(days=1)


class Processes:
    """rank: the number of this process, from 0. count: of all. device: this process's own."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the first process, in all of them; the others wait and do not call it.

        A UserError is raised in the first; the others leave silently.
        """
        if self.count == 1:
            return function()
        answer: list = [None, None]
        if self.first:
            try:
                answer = [function(), None]
            except UserError as error:
                answer = [None, error]
        broadcast_object_list(answer)
        result, error = answer
        if error is not None:
            raise error if self.first else SystemExit(2)
        return result

    def gather(self, value: Result) -> list[Result]:
        """Every process's value, in the order of the ranks, in all of them."""
        return gather_object([value]) if self.count > 1 else [value]

    def leave(self) -> None:
        """Dissolve the group."""
        if self.count > 1:
            self._state.destroy_process_group()


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


def shard(model: nn.Module, blocks: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """FSDP2: block by block each process keeps its shard of the weights, in place.

    The shards stay in fp32 and autocast rounds what a matrix product reads, as in one process.
    """
    # What it warns of, changing an output in place, nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP. Every buffer and every weight starts out the same, as all processes have the same seed."""
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def synchronizing(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward: gradients are exchanged in the last of a step's micro-batches only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sharded as `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


RARELY = 10.0  # seconds between two lines of a bar in a file or a pipe, where each stays


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on standard error; where that is no terminal, it is printed at most every RARELY seconds.

    Set its postfix with refresh=False, which would print it at once.

    Args:
        iterable: what the bar goes along with, or None for one that is moved by `update`.
        options: tqdm's own, such as total, desc and unit.
    """
    from tqdm import tqdm

    if not watched():
        options["mininterval"] = options["maxinterval"] = RARELY
    return tqdm(iterable, **options)


def watched() -> bool:
    """Whether standard error is a terminal; not if it is closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
