"""What a SiT is told beside the tokens: the image cut into patches, the time, the class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PatchEmbedder(nn.Module):
    """Images (B, C, S, S) to tokens (B, (S/P)², width), row by row: one linear map per patch."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times (B,) to (B, width): cosines, then sines, of t·10000^(-i/128), and a two-layer perceptron.

    t in [0, 1] is fed as it is (DDPM-style models multiply it by 1000).
    """

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def frequencies(self, t: Tensor) -> Tensor:
        """(B,) to (B, num_frequencies), float32 whatever the type of t (float64 for float64)."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        half = self.num_frequencies // 2
        exponent = torch.arange(half, dtype=dtype, device=t.device) / half
        angles = t[:, None].to(dtype) * torch.exp(-math.log(10000.0) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Classes (B,) to (B, width). While training, a label becomes the null class with probability `dropout`.

    The null class, for classifier-free guidance, is number `num_classes`; its row exists only if dropout > 0.
    """

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)
