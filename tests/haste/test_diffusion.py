"""Against definitions written here in plain float64, from the papers' formulas, and against diffusers' tables."""

import math

import numpy as np
import pytest
import torch
from haste import diffusion
from haste.diffusion import NoiseTarget, add_noise, noise_loss, spaced_times, steps_between
from haste.errors import UserError

BETAS = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
ALPHA_BARS = np.cumprod([1 - beta for beta in BETAS])


def normal_divergence(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 ‖ N_2) in nats."""
    ratio = math.e ** (log_variance_1 - log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + (mean_1 - mean_2) ** 2 / math.e**log_variance_2 - 1)


def phi(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bound_of_image(x, x_t, noise, u, t):
    """The term of one image (C, H, W) at time t, in bits per dimension, by DDPM's eq. 6 to 8 and 13."""
    alpha_bar, before, beta = ALPHA_BARS[t], ALPHA_BARS[t - 1] if t else 1.0, BETAS[t]
    guess = (x_t - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)
    of_x, of_x_t = math.sqrt(before) * beta / (1 - alpha_bar), math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    s = max(t, 1)  # time 0 has no posterior variance, and takes that of time 1
    low, high = math.log(BETAS[s] * (1 - ALPHA_BARS[s - 1]) / (1 - ALPHA_BARS[s])), math.log(beta)
    log_variance = (u + 1) / 2 * high + (1 - u) / 2 * low
    mean = of_x * guess + of_x_t * x_t
    if t:
        own = normal_divergence(of_x * x + of_x_t * x_t, torch.tensor(low, dtype=torch.float64), mean, log_variance)
    else:
        deviation = torch.exp(log_variance / 2)
        above, below = phi((x + 1 / 255 - mean) / deviation), phi((x - 1 / 255 - mean) / deviation)
        mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
        own = -torch.log(mass.clamp(min=1e-12))
    return own.mean() / math.log(2)


def defined_loss(predicted, x, noise, times):
    total = 0
    for own, image, eps, t in zip(predicted, x, noise, times, strict=True):
        guessed, u = own[: len(image)], own[len(image) :]
        x_t = math.sqrt(ALPHA_BARS[t]) * image + math.sqrt(1 - ALPHA_BARS[t]) * eps
        total = total + ((guessed - eps) ** 2).mean() + bound_of_image(image, x_t, guessed.detach(), u, t)
    return total / len(x)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    times = [0, 0, 1, 2, 17, 500, 998, 999]
    x = torch.rand(len(times), 3, 4, 4, dtype=torch.float64) * 2 - 1
    x[:2, 0, 0] = torch.tensor([-1.0, 1.0, -0.9995, 0.9995])  # in the outermost bins
    noise = torch.randn_like(x)
    predicted = torch.cat([noise + 0.05 * torch.randn_like(x), torch.randn_like(x)], dim=1).requires_grad_()
    return predicted, x, noise, times


def test_the_loss_and_its_gradient_are_those_of_the_definition(problem):
    predicted, x, noise, times = problem
    found = noise_loss(predicted, NoiseTarget(x, noise, torch.tensor(times)))
    (gradient,) = torch.autograd.grad(found, predicted)
    expected = defined_loss(predicted, x, noise, times)
    (expected_gradient,) = torch.autograd.grad(expected, predicted)
    assert abs(found - expected) <= 1e-12 * abs(expected)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


def test_the_bound_does_not_reach_the_noise(problem):
    predicted, x, noise, times = problem
    (gradient,) = torch.autograd.grad(noise_loss(predicted, NoiseTarget(x, noise, torch.tensor(times))), predicted)
    mean_square = 2 * (predicted[:, :3] - noise) / noise.numel()
    torch.testing.assert_close(gradient[:, :3], mean_square, rtol=1e-12, atol=0)
    assert gradient[:, 3:].abs().min() > 0


def test_half_precision_is_computed_in_float32(problem):
    predicted, x, noise, times = problem
    rounded = predicted.detach().to(torch.bfloat16)
    target = NoiseTarget(x.float(), noise.float(), torch.tensor(times))
    found = noise_loss(rounded, target)
    assert found.dtype == torch.float32
    expected = noise_loss(rounded.double(), NoiseTarget(x.float().double(), noise.float().double(), target.t))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_a_perfect_prediction_with_the_posterior_variance_costs_nothing_but_the_first_time():
    x, noise = torch.rand(1, 1, 2, 2).double(), torch.randn(1, 1, 2, 2).double()
    predicted = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    for t in (1, 500, 999):
        assert noise_loss(predicted, NoiseTarget(x, noise, torch.tensor([t]))).abs() < 1e-12


def test_a_prediction_without_the_variance_is_refused():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^predicted must have shape \(2, 6, 4, 4\), .* got \(2, 3, 4, 4\)$"):
        noise_loss(x, NoiseTarget(x, x, torch.tensor([0, 1])))


def test_noise_is_added_by_the_product_of_alphas():
    x, noise = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    found = add_noise(x, noise, torch.tensor([0, 500, 999]))
    for image, t in enumerate((0, 500, 999)):
        alpha_bar = ALPHA_BARS[t]
        expected = math.sqrt(alpha_bar) * x[image] + math.sqrt(1 - alpha_bar) * noise[image]
        torch.testing.assert_close(found[image], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [-1, 1000])
def test_times_beyond_the_tables_are_refused(t):
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=rf"^t must be whole numbers from 0 to 999, got \[0, {t}\]$"):
        add_noise(x, x, torch.tensor([0, t]))


def test_tables_outlive_the_default_device_under_which_they_are_made():
    diffusion.alpha_bars.cache_clear()
    diffusion._every_step.cache_clear()
    with torch.device("meta"):
        assert diffusion.alpha_bars()[999].item() == pytest.approx(ALPHA_BARS[999], rel=1e-12)
        assert diffusion._every_step(torch.device("cpu")).beta[999].item() == pytest.approx(0.02, rel=1e-12)


def test_times_are_uniform_from_0_to_999():
    times = diffusion.sample_times(200_000, generator=torch.Generator().manual_seed(0))
    counts = times.bincount(minlength=1000)
    assert len(counts) == 1000 and times.dtype == torch.int64
    assert counts.min() > 120 and counts.max() < 280  # 200 ± 14


def published_spacing(count: int) -> list[int]:
    """Improved DDPM's: strides of 999 / (count − 1), added up and rounded."""
    stride, place, times = 999 / (count - 1) if count > 1 else 1.0, 0.0, []
    for _ in range(count):
        times.append(round(place))
        place += stride
    return sorted(set(times), reverse=True)


def test_linspace_is_the_published_respacing():
    for count in range(1, 1001):
        assert spaced_times(count).tolist() == published_spacing(count), count


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 4, 20, 50, 250, 1000])
def test_times_are_those_of_diffusers(spacing, count):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    assert spaced_times(count, spacing).tolist() == scheduler.timesteps.tolist()


def test_coefficients_of_a_respaced_run_are_those_of_its_own_betas():
    times = spaced_times(7)
    steps, previous = steps_between(times), 1.0
    for index in reversed(range(7)):
        alpha_bar = ALPHA_BARS[times[index]]
        beta = 1 - alpha_bar / previous
        assert steps.beta[index].item() == pytest.approx(beta, rel=1e-12)
        assert steps.log_beta[index].item() == pytest.approx(math.log(beta), rel=1e-12)
        if index < 6:
            posterior = math.log(beta * (1 - previous) / (1 - alpha_bar))
            assert steps.log_posterior[index].item() == pytest.approx(posterior, rel=1e-12)
        previous = alpha_bar
    assert steps.log_posterior[6] == steps.log_posterior[5]


@pytest.mark.parametrize(
    ("count", "spacing", "sentence"),
    [
        (30, "leading", "num_steps must divide 1000 with timestep_spacing leading, got 30"),
        (30, "trailing", "num_steps must divide 1000 with timestep_spacing trailing, got 30"),
        (1001, "linspace", "num_steps must be a whole number from 1 to 1000, .* got 1001"),
        (0, "linspace", "num_steps must be a whole number from 1 to 1000, .* got 0"),
        (2.5, "linspace", "num_steps must be a whole number from 1 to 1000, .* got 2.5"),
        (50, "even", "timestep_spacing must be one of linspace, leading, trailing, got 'even'"),
    ],
)
def test_times_that_cannot_be_are_refused(count, spacing, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        spaced_times(count, spacing)
