"""The features of the last full evaluations, kept raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where in a run an evaluation stands: the index of its time on the sampler's grid, and the time."""

    position: float
    time: float


class SnapshotRing:
    """The last `slots` snapshots of `modules` modules, in one tensor `storage` (modules, slots, rows, N, D).

    One tensor, so that a forecast reads the snapshots of all modules in one launch. The oldest slot is overwritten in
    place; nothing moves, and the weights of a forecast are put in the order of the slots.

    The rows are those of the guidance branches one after the other. A branch that sits out some steps keeps what it
    has, and each branch is forecast from the slots that hold its own rows.
    """

    def __init__(self, modules: int, slots: int) -> None:
        self.modules = modules
        self.slots = slots
        self.release()

    def release(self) -> None:
        """Forgets all snapshots and lets go of their memory."""
        self.storage: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets all snapshots; the memory stays for the next ones."""
        self._places: list[Place] = []  # of the snapshots, newest first
        self._slot_of: list[int] = []  # of the snapshots, newest first
        self._held_by: list[set[str]] = []  # the branches in each, newest first

    def require(self, rows: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the storage fit; snapshots of another shape, type or device are forgotten."""
        shape = (self.modules, self.slots, rows, tokens, dim)
        storage = self.storage
        if storage is None or storage.shape != shape or storage.dtype != dtype or storage.device != device:
            self.release()  # before the new one needs the memory
            with torch.inference_mode(False):  # a later run outside of that mode writes to it too
                self.storage = torch.empty(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return 0 if self.storage is None else self.storage.nbytes

    def places(self, branch: str) -> list[Place]:
        """Where this branch's snapshots were taken, newest first."""
        return [place for place, held in zip(self._places, self._held_by, strict=True) if branch in held]

    def open(self, place: Place, branches: Sequence[str]) -> int:
        """The slot that these branches' snapshot at `place` goes to.

        One at the newest position, of another branch or of Heun's second evaluation, shares its slot: no difference can
        be divided by a distance of 0.
        """
        if not (self._places and self._places[0].position == place.position):
            if len(self._places) < self.slots:
                slot = len(self._places)
            else:
                self._places.pop()
                self._held_by.pop()
                slot = self._slot_of.pop()
            self._places.insert(0, place)
            self._held_by.insert(0, set())
            self._slot_of.insert(0, slot)
        self._held_by[0] |= set(branches)
        return self._slot_of[0]

    def by_slot(self, weights: Sequence[float], branch: str) -> list[float]:
        """Weights of this branch's snapshots, newest first, in the order of the slots.

        A slot that does not hold this branch gets 0, and a slot of weight 0 is never read.
        """
        slots = [0.0] * self.slots
        own = [slot for slot, held in zip(self._slot_of, self._held_by, strict=True) if branch in held]
        for slot, weight in zip(own, weights, strict=True):
            slots[slot] = weight
        return slots
