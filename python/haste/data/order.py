"""The order of the training pictures, as a function of the step alone."""

from __future__ import annotations

import torch


class BatchOrder:
    """Shuffled epochs end to end, cut into batches.

    Batch number s holds positions s·B to (s+1)·B of the stream; epoch e of the stream is a permutation that depends on
    the seed and e only. So a resumed run continues at any step without replaying the steps before it, every picture
    comes once per epoch, and a batch may span two epochs.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples is {num_samples} and batch_size {batch_size}; both must be at least 1")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> torch.Tensor:
        """Indices (batch_size,), int64, of the pictures of batch number `step`, counted from 0."""
        position = step * self.batch_size
        end = position + self.batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            part = self._epoch_order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return torch.cat(parts)

    def share(self, step: int, process_index: int, num_processes: int) -> torch.Tensor:
        """The contiguous part of batch number `step` that one of several processes works on."""
        return self.batch(step).chunk(num_processes)[process_index]

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return self._permutation
