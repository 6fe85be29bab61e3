"""Mean and standard deviation of latent channels against their definition, and how they are shared and stored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from haste.data.latent_statistics import ChannelStatistics, measure, merged, write_statistics
from haste.errors import BadFile, UserError
from haste.vae import SD_LATENTS, read_statistics


def random_moments(count: int = 23, channels: int = 3) -> np.ndarray:
    """(count, 2C, 4, 4) with a mean far from 0, of which a sum of squares would lose digits."""
    generator = np.random.default_rng(0)
    means = generator.normal(1000, [[[[0.1]], [[1.0]], [[30.0]]]], (count, channels, 4, 4))
    deviations = generator.uniform(0, 2, (count, channels, 4, 4))
    return np.concatenate([means, deviations], axis=1).astype(np.float32)


class Folder:
    """Units of five images, of which the second has none."""

    path = None

    def __init__(self, moments: np.ndarray) -> None:
        self.parts = [moments[start : start + 5] for start in range(0, len(moments), 5)]
        self.parts.insert(1, moments[:0])

    def latent_units(self) -> int:
        return len(self.parts)

    def unit_moments(self, unit: int) -> Iterator[np.ndarray]:
        return iter(self.parts[unit])


def test_they_are_those_of_the_definition_for_any_number_of_processes():
    moments = random_moments()
    means, deviations = np.split(moments.astype(np.float64), 2, axis=1)
    folder, found = Folder(moments), []
    for processes in (1, 2, 3):
        parts = [measure(folder, range(process, folder.latent_units(), processes)) for process in range(processes)]
        found.append(merged(parts))
    for statistics in found:
        np.testing.assert_allclose(statistics.mean, means.mean((0, 2, 3)), rtol=1e-14)
        variance = means.var((0, 2, 3)) + (deviations**2).mean((0, 2, 3))
        np.testing.assert_allclose(statistics.std, variance**0.5, rtol=1e-12)
        assert all(np.array_equal(a, b) for a, b in zip(statistics, found[0], strict=True))
    assert merged([{}]) is None


def test_they_are_those_of_what_is_sampled():
    moments = torch.from_numpy(random_moments(200, 3)[:, [0, 1, 2, 3, 4, 5]])
    statistics = merged([measure(Folder(moments.numpy()), range(41))])
    mean, std = moments.double().chunk(2, dim=1)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), statistics.mean, atol=1.5)
    np.testing.assert_allclose(drawn.std((0, 2, 3)), statistics.std, rtol=0.05)


def test_the_file_is_lightningdits_and_that_of_vae_stats(tmp_path):
    moments = random_moments(6, 3)
    statistics = merged([measure(Folder(moments), range(3))])
    path = tmp_path / "latents_stats.pt"
    write_statistics(path, statistics)
    values = torch.load(path, weights_only=True)
    assert {name: (tuple(value.shape), value.dtype) for name, value in values.items()} == {
        "mean": ((1, 3, 1, 1), torch.float32), "std": ((1, 3, 1, 1), torch.float32)}  # fmt: skip
    shift, scale = read_statistics(str(path), 3)
    np.testing.assert_allclose(shift, statistics.mean, rtol=1e-7)
    np.testing.assert_allclose(scale, 1 / statistics.std, rtol=1e-6)
    before = path.read_bytes()
    write_statistics(path, statistics)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="--vae-stats must be for 4 channels, as the latents, got 3"):
        SD_LATENTS.with_statistics(str(path))


def test_a_channel_that_never_changes_is_shifted_alone(tmp_path):
    write_statistics(tmp_path / "x.pt", ChannelStatistics.of(np.array([2.0, 0.0]).reshape(2, 1, 1)))
    assert read_statistics(str(tmp_path / "x.pt"), 1) == ((2.0,), (1.0,))


def test_a_damaged_file_is_named():
    folder = Folder(random_moments(5))
    folder.unit_moments = lambda unit: (_ for _ in ()).throw(BadFile("x.npy", "is damaged"))
    with pytest.raises(UserError, match="x.npy is damaged; remove it"):
        measure(folder, [0])
