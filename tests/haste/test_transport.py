"""Paths, targets, times and the score, against finite differences and a Gaussian in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from haste.errors import UserError
from haste.transport import get_path, interpolate, sample_time, score_from_velocity, shift_time, velocity_loss

PATH_NAMES = ("linear", "cosine")


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_velocity_is_the_derivative_of_the_path(path):
    x, noise = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-5
    derivative = (interpolate(x, noise, t + h, path)[0] - interpolate(x, noise, t - h, path)[0]) / (2 * h)
    torch.testing.assert_close(interpolate(x, noise, t, path)[1], derivative, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_path_goes_from_data_to_noise(path):
    x, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(interpolate(x, noise, torch.zeros(2), path)[0], x)
    torch.testing.assert_close(interpolate(x, noise, torch.ones(2), path)[0], noise)


def test_the_linear_target_is_noise_minus_data():
    x, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(interpolate(x, noise, torch.rand(2), "linear")[1], noise - x)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_score_of_a_gaussian(path):
    """Data N(m, s²): x_t is N(αm, α²s² + σ²), and E[v | x_t] follows from the regression of x and ε on x_t."""
    mean, std = 0.7, 0.4
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 1.0, 6, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None, None] for c in get_path(path).coefficients(t))
    variance = (alpha * std) ** 2 + sigma**2
    centred = x - alpha * mean
    velocity = d_alpha * (mean + alpha * std**2 / variance * centred) + d_sigma * (sigma / variance * centred)
    torch.testing.assert_close(score_from_velocity(velocity, x, t, path), -centred / variance)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_lognormal_times_have_lognormal_noise_levels(path):
    t = sample_time(20_000, "lognormal", path, generator=torch.Generator().manual_seed(0))
    assert t.shape == (20_000,) and t.min() > 0 and t.max() < 1
    alpha, sigma, _, _ = get_path(path).coefficients(t.double())
    log_level = (sigma / alpha).log()
    assert log_level.mean().item() == pytest.approx(0, abs=0.03)
    assert log_level.std().item() == pytest.approx(1, abs=0.03)
    normal_cdf = 0.5 * (1 + torch.erf(log_level.sort().values / math.sqrt(2)))
    assert (normal_cdf - torch.linspace(0, 1, 20_000)).abs().max() < 0.015  # Kolmogorov-Smirnov, 99.9 % is 0.0138


def test_uniform_times():
    t = sample_time(20_000, generator=torch.Generator().manual_seed(0)).sort().values
    assert (t - torch.linspace(0, 1, 20_000)).abs().max() < 0.015


def test_velocity_loss_is_a_mean_of_means_in_float32():
    predicted, target = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = sum(((p - q) ** 2).sum().item() / 75 for p, q in zip(predicted, target, strict=True)) / 4
    assert velocity_loss(predicted, target).item() == pytest.approx(expected, rel=1e-5)
    assert velocity_loss(predicted.bfloat16(), target).dtype == torch.float32


def test_bad_values():
    with pytest.raises(UserError, match="path must be one of linear, cosine"):
        interpolate(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), "vp")
    with pytest.raises(UserError, match="weighting must be one of uniform, lognormal"):
        sample_time(3, "logit")
    with pytest.raises(ValueError, match=r"predicted must have the shape of target, \(2, 1\)"):
        velocity_loss(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize("path", PATH_NAMES)
def test_a_shift_multiplies_the_noise_level(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    levels = [sigma / alpha for alpha, sigma, _, _ in map(get_path(path).coefficients, (t, shift_time(t, 3.0, path)))]
    torch.testing.assert_close(levels[1], 3 * levels[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0, path), 1 / 3, path), t)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_time(ends, 7.0, path), ends) and shift_time(t, 1.0, path) is t


def test_the_shift_is_that_of_the_papers():
    """SD3, eq. 23 (resolution 1024 from 512: √4 = 2), RAE's √(196608 / 4096), and LightningDiT's 0.3 where t = 1 is
    data."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 2.0), 2 * t / (1 + t))
    rae = (16 * 16 * 768 / 4096) ** 0.5
    torch.testing.assert_close(shift_time(t, rae), rae * t / (1 + (rae - 1) * t))
    data_time = 1 - t
    shifted = 0.3 * data_time / (1 + (0.3 - 1) * data_time)
    torch.testing.assert_close(shift_time(t, 1 / 0.3), 1 - shifted)
