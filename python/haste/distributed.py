"""Ctrl-C and SIGTERM ask the loop to stop at the end of its step, so that it can save first.

The processes that share one command, as torchrun or `accelerate launch` start them; or one alone.

The progress bars of all commands.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from haste.errors import UserError


class StopRequest:
    """While this context is open, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Several processes must stop after the same step, and each may hear at another one, or alone. So they vote at every
    step, on the CPU and a step late: nobody waits for a vote that is still on its way. A second signal is noted there
    like the first: launchers pass on to their processes what these have received already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
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
        """The signal on account of which to stop, if any; the same in every process. To be asked once a step."""
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

# A process that has nothing left to draw waits for the others' last batch, which may take hours on a CPU.
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

        A UserError is raised in the first; the others leave without a word.
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
        """Dissolve the group, once nothing is left to be said."""
        if self.count > 1:
            self._state.destroy_process_group()


if TYPE_CHECKING:
    from tqdm import tqdm

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
