"""The features of the last full steps, kept raw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SnapshotRing:
    """The last `slots` snapshots of `modules` modules, in one tensor `storage` (modules, slots, B, N, D).

    One tensor, so that a forecast may read one module's snapshots, or those of all modules in one launch. The oldest
    slot is overwritten in place; nothing moves, and the weights of a forecast are put in the order of the slots.
    """

    def __init__(self, modules: int, slots: int) -> None:
        self.modules = modules
        self.slots = slots
        self.clear()

    def clear(self) -> None:
        """Lets go of everything."""
        self.storage: Tensor | None = None
        self.positions: list[int] = []  # of the snapshots, newest first
        self._slot_of: list[int] = []  # of the snapshots, newest first

    def fits(self, tokens: Tensor) -> bool:
        """Whether snapshots are held, and belong to tokens (B, N, D) of this shape on this device."""
        return self.storage is not None and (
            self.storage.shape[2:] == tokens.shape and self.storage.device == tokens.device
        )

    def open(self, position: int) -> None:
        """Begins the snapshot of a full evaluation at `position`; one `write` per module follows.

        A second one at the newest position takes its place: no difference can be divided by a distance of 0.
        """
        if self.positions and self.positions[0] == position:
            return
        if len(self.positions) < self.slots:
            slot = len(self.positions)
        else:
            self.positions.pop()
            slot = self._slot_of.pop()
        self.positions.insert(0, position)
        self._slot_of.insert(0, slot)

    def write(self, module: int, feature: Tensor) -> None:
        """Keeps one module's feature (B, N, D) in the snapshot that was opened last."""
        if self.storage is None:
            shape = (self.modules, self.slots, *feature.shape)
            self.storage = torch.empty(shape, dtype=feature.dtype, device=feature.device)
        self.storage[module, self._slot_of[0]].copy_(feature)

    def by_slot(self, weights: Sequence[float]) -> Tensor:
        """Weights of the snapshots, newest first, as (slots,), float32, beside the storage.

        A slot that is not in use yet gets 0, and a slot of weight 0 is never read.
        """
        slots = [0.0] * self.slots
        for slot, weight in zip(self._slot_of, weights, strict=True):
            slots[slot] = weight
        return torch.tensor(slots, dtype=torch.float32, device=self.storage.device)
