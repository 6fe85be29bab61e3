"""Ctrl-C and SIGTERM ask the loop to stop at the end of its step, so that it can save first."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist


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
