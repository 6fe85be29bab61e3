"""The processes of a command: sharding a model, stopping together, and progress bars.

accelerate reads the kind of run from its launcher:

    python -m haste train ...                                                      one process
    accelerate launch --multi_gpu -m haste train ...                               DDP
    accelerate launch --use_fsdp --fsdp_version 2 -m haste train ...               FSDP2

or, for two machines of eight GPUs, on each machine with its rank, 0 or 1:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip 10.0.0.1 --main_process_port 29500 -m haste train ...

with --output-dir on a file system that both share.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """While this context is open, the first SIGINT or SIGTERM is recorded; a second one acts as usual.

    Several processes must stop after the same step, but a signal may reach them at different steps, or only one of
    them. So they vote at every step, on the CPU, and read the result a step later, which takes no waiting. There, a
    second signal is recorded like the first, as launchers forward signals that the processes have received already.
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
            self._vote.wait()  # no process leaves while another waits for its vote
        self._restore()

    def poll(self) -> signal.Signals | None:
        """The signal for which to stop, the same in every process; None if there is none. To be called once a step."""
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
    """The processes of a command that samples.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        device: of this process.
    """

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, function: Callable[[], Result]) -> Result:
        """`in_first`."""
        return in_first(function)

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, in the order of the ranks."""
        return gather_object([value]) if self.count > 1 else [value]

    def leave(self) -> None:
        """Destroy the process group."""
        if self.count > 1:
            self._state.destroy_process_group()


def in_first(function: Callable[[], Result]) -> Result:
    """Call `function` in the first process, while the others wait, and return its result in all.

    A UserError is raised in the first process; the others exit silently.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer = [function(), None]
        except UserError as error:
            answer = [None, error]
    broadcast_object_list(answer)
    result, error = answer
    if error is not None:
        raise error if state.is_main_process else SystemExit(2)
    return result


def sharding() -> bool:
    """Whether the command was launched with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: nn.Module, blocks: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """FSDP2, block by block and in place. The shards stay in fp32; autocast rounds as in one process."""
    # It warns of changing an output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """While this context is open, every process has the whole weights, so that any part of a model can be called, and
    not only its blocks and the whole. Every process must enter it. A model that is not sharded is left as it is."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a forward pass without gradient leaves behind: those outside the blocks, which only a
    backward pass would free. A change of them would be lost."""
    if isinstance(model, FSDPModule):
        model.reshard()


def replicate(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP. All processes have the same seed, so weights and buffers are the same at the start; buffers stay so."""
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def synchronizing(model: nn.Module, last: bool) -> AbstractContextManager:
    """Context of forward and backward: gradients are exchanged only in the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor without sharding. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, which is the same in every process, as `like` is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


RARELY = 10.0  # seconds between two lines of a bar in a file or a pipe


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on standard error, printed at most every RARELY seconds if that is no terminal.

    Set its postfix with refresh=False, else it is printed at once.

    Args:
        iterable: to iterate over; None for a bar that `update` moves.
        options: tqdm's arguments, such as total, desc and unit.
    """
    from tqdm import tqdm

    if not watched():
        options["mininterval"] = options["maxinterval"] = RARELY
    return tqdm(iterable, **options)


def watched() -> bool:
    """Whether standard error is open and a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
