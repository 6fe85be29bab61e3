"""The processes that share one command, as torchrun or `accelerate launch` start them; or one alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from haste.errors import UserError

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
