"""The batches of a run from any step on, and the images of a probe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator

from haste.data import Batch, BatchOrder, TrainingData, batches
from haste.training.config import TrainConfig


class Loader:
    """This process's local batch of every micro-batch.

    What is random in a batch, such as a latent sampled from its mean and standard deviation, is a function of the seed,
    the micro-batch and the process: it needs no place in a checkpoint.

    start: the step to begin with. images: whether a teacher looks at the images.
    """

    def __init__(
        self, data: TrainingData, config: TrainConfig, accelerator: Accelerator, start: int, images: bool
    ) -> None:
        self.data = data if images else data.without_images()
        self.config = config
        self.accelerator = accelerator
        self.chance = torch.Generator(accelerator.device)
        order = BatchOrder(len(data), config.batch_size, config.seed)
        self._batches = self._local(order, start * config.gradient_accumulation_steps)

    def _local(self, order: BatchOrder, start: int) -> Iterator[Batch]:
        return batches(
            self.data,
            order,
            start,
            self.accelerator.device,
            self.config.num_workers,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.chance,
        )

    def next(self, step: int, number: int) -> Batch:
        """The local batch of a step's micro-batch with this number; to be called in order."""
        self._seed(step * self.config.gradient_accumulation_steps + number)
        return next(self._batches)

    def probe(self) -> Iterator[Batch]:
        """The images of a probe, the same ones every time. Half as many at once: a probe computes in fp32."""
        processes = self.accelerator.num_processes
        size = max(1, self.config.batch_size // processes // 2) * processes
        self._seed(0)
        count = max(1, min(self.config.probe_images, len(self.data)) // size)
        return itertools.islice(self._local(BatchOrder(len(self.data), size, seed=0), 0), count)

    def close(self) -> None:
        """End the worker processes."""
        self._batches.close()  # type: ignore[attr-defined]

    def _seed(self, number: int) -> None:
        entropy = (self.config.seed, number, self.accelerator.process_index)
        self.chance.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
