"""The modulations of xAR's blocks, which depend on class and time alone: made once for all steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haste.models.xar import XAR

TABLE_BYTES = 2**30  # of a table of modulations, at most


class Modulations:
    """The six vectors of each block, by class and time: g₁, g₂, 1 + s₁, 1 + s₂, b₁, b₂.

    Args:
        labels: (rows,) int64; rows of the same class share an entry.
        times: those whose entries are made at once.
        table_bytes: if these need more, none is made, and `at` computes those that it is asked for.

    Attributes:
        table: (blocks, times · classes, 6, width), or None.
    """

    def __init__(self, model: XAR, labels: Tensor, times: Sequence[float], table_bytes: int) -> None:
        self.model = model
        self.labels = labels
        self.classes, self._class_of_row = labels.unique(return_inverse=True)
        self.table: Tensor | None = None
        times = sorted({0.0, *times})
        if modulation_bytes(model, len(self.classes), len(times)) <= table_bytes and len(times) > 1:
            self._position = {time: number for number, time in enumerate(times)}
            self.table = self._compute(times)

    def at(self, times: Sequence[float], rows: slice) -> Tensor:
        """Those of each part and row: (blocks, rows, parts, 6, width)."""
        table, position = self.table, getattr(self, "_position", {})
        if table is None or not all(time in position for time in times):
            distinct = sorted(set(times))
            table, position = self._compute(distinct), {time: number for number, time in enumerate(distinct)}
        starts = torch.tensor([position[time] * len(self.classes) for time in times]).to(self.labels.device)
        entries = self._class_of_row[rows, None] + starts
        return table.index_select(1, entries.flatten()).unflatten(1, tuple(entries.shape))

    @torch.no_grad()
    def _compute(self, times: Sequence[float]) -> Tensor:
        """(blocks, times · classes, 6, width)."""
        model, classes = self.model, self.classes
        t = torch.tensor(times, dtype=torch.float32, device=classes.device)
        c = model.conditioning(t.expand(len(classes), -1), classes).transpose(0, 1).flatten(0, 1)
        table: Tensor | None = None
        for index, block in enumerate(model.blocks):
            entries = block.ada_lin(c).unflatten(-1, (6, -1))
            if table is None:
                table = entries.new_empty(len(model.blocks), *entries.shape)
            table[index] = entries
        assert table is not None
        table[:, :, 2:4] += 1
        return table


def modulation_bytes(model: XAR, classes: int, times: int) -> int:
    """Bytes of the table of modulations of so many classes, the null class among them, at so many times."""
    width = model.z_proj.out_features
    return len(model.blocks) * classes * times * 6 * width * model.dtype.itemsize
