"""Pictures that fit into memory: they stay on the training device, and a sample is no more than its number."""

from __future__ import annotations

import torch
from torch import Tensor

from haste.data.training_data import Batch, TrainingData


class InMemoryData(TrainingData):
    """images: (M, C, R, R), float32 in [-1, 1]; labels: (M,), int64, 0 to num_classes - 1."""

    reads_files = False

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        super().__init__(images.shape[-1], num_classes, channels=images.shape[1])
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, samples: list[int]) -> Tensor:
        return torch.tensor(samples)

    def to_batch(self, raw: Tensor, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        self._images, self._labels = self._images.to(device), self._labels.to(device)
        indices = raw.to(device, non_blocking=True)
        images = self._images[indices]
        return Batch(images, images, self._labels[indices])
