"""Mean and standard deviation of each channel of prepared latents, the file that --vae-stats reads.

They are those of what training samples: the variance is that of the means plus the mean of the posterior's variances,
over all images and positions. Numbers are float64 and merged in the order of the images, unit after unit, so that any
number of processes, and a command that was killed, come to the same bits.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from haste.errors import BadFile, UserError
from haste.io import write_atomically

STATISTICS = "latents_stats.pt"  # LightningDiT's name, with its mean and std of (1, C, 1, 1)
UNIT = 1000  # images of a unit, where a layout has none of its own


class ChannelStatistics(NamedTuple):
    """Of `size` latents of each channel: their mean (C,), and the sum (C,) of their squared distances from it."""

    size: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> ChannelStatistics:
        """Of one image's moments (2C, S, S), means and then standard deviations."""
        means, deviations = np.split(moments.reshape(len(moments), -1).astype(np.float64), 2)
        mean = means.mean(axis=1)
        squares = ((means - mean[:, None]) ** 2 + deviations**2).sum(axis=1)
        return cls(means.shape[1], mean, squares)

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Of both together (Chan, Golub and LeVeque 1979, equation 2.1)."""
        size, distance = self.size + other.size, other.mean - self.mean
        mean = self.mean + distance * (other.size / size)
        squares = self.squares + other.squares + distance**2 * (self.size * other.size / size)
        return ChannelStatistics(size, mean, squares)

    @property
    def std(self) -> np.ndarray:
        """(C,), of the population."""
        return np.sqrt(self.squares / self.size)


class PreparedLatents(Protocol):
    """A folder of `haste prepare` whose latents are measured."""

    path: Path

    def latent_units(self) -> int:
        """The number of units that processes share; 0 if there is nothing to measure."""

    def unit_moments(self, unit: int) -> Iterable[np.ndarray]:
        """The moments (2C, S, S) of a unit's images in order, means and then standard deviations. Raises BadFile."""


def measure(
    folder: PreparedLatents, units: Iterable[int], progress: Callable[[], object] = lambda: None
) -> dict[int, ChannelStatistics]:
    """The statistics of each of these units that has images; `progress` is called after each. Raises UserError for a
    damaged file."""
    found = {}
    for unit in units:
        try:
            images = [ChannelStatistics.of(moments) for moments in folder.unit_moments(unit)]
        except BadFile as fault:
            raise UserError(f"{fault}; remove it, and the same command makes it again") from fault
        if images:
            found[unit] = functools.reduce(ChannelStatistics.merge, images)
        progress()
    return found


def merged(parts: Sequence[Mapping[int, ChannelStatistics]]) -> ChannelStatistics | None:
    """Of all units of all processes, in the order of the units; None without any."""
    units = {unit: found for part in parts for unit, found in part.items()}
    ordered = [units[unit] for unit in sorted(units)]
    return functools.reduce(ChannelStatistics.merge, ordered) if ordered else None


def write_statistics(path: Path, statistics: ChannelStatistics) -> None:
    """Write `mean` and `std`, (1, C, 1, 1) float32. A channel that never changes has std 1. Raises OSError."""
    std = np.where(statistics.std > 0, statistics.std, 1.0)
    file = io.BytesIO()
    values = {"mean": statistics.mean, "std": std}
    torch.save({name: torch.from_numpy(value).float().view(1, -1, 1, 1) for name, value in values.items()}, file)
    write_atomically(path, lambda temporary: temporary.write_bytes(file.getvalue()))
