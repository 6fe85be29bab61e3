"""Diffusion by predicted noise with a learned variance, as DiT has it (arXiv 2212.09748): its noise, its loss and the
times of its samplers. Beside it stands `haste.transport`, the path on which a velocity is learned.

DDPM (arXiv 2006.11239): times t are whole numbers, 0 (almost data) to 999 (noise), with β_t linear from 1e-4 to 0.02,
α_t = 1 − β_t, ᾱ_t the product of α_0 ... α_t, and x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε.

Improved DDPM (arXiv 2102.09672): a model returns ε̂ and, in as many channels behind it, u, by which the variance of its
step to t − 1 is between two bounds, log Σ = f·log β_t + (1 − f)·log β̃_t with f = (u + 1)/2.

The tables are computed in float64 and are read in the type of the images, at least float32.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from haste.errors import UserError

NUM_TIMES = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02

SPACINGS = ("linspace", "leading", "trailing")


class Step(NamedTuple):
    """The coefficients of steps from a time to an earlier one, float64, of one shape.

    alpha_bar, alpha_bar_next: ᾱ where the step begins and where it ends; 1 is data.
    alpha, beta: α = ᾱ/ᾱ_next and 1 − α, which are those of the process if it goes to the time before.
    log_beta, log_posterior: the bounds of log Σ: log β, and log β̃ with β̃ = β·(1 − ᾱ_next)/(1 − ᾱ). The last step of a
        run has β̃ = 0, and takes the one before it, as improved DDPM does.
    """

    alpha_bar: Tensor
    alpha_bar_next: Tensor
    alpha: Tensor
    beta: Tensor
    log_beta: Tensor
    log_posterior: Tensor


@cache  # as every step of training reads them
def alpha_bars(device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008 - never changed
    """ᾱ of each time, (1000,), float64."""
    # On the CPU whatever the default device is, for what is cached outlives it.
    betas = torch.linspace(BETA_FIRST, BETA_LAST, NUM_TIMES, dtype=torch.float64, device="cpu")
    return (1 - betas).cumprod(0).to(device)


def steps_between(times: Tensor) -> Step:
    """The steps of a run through falling times, (n,) int64, and on to data."""
    alpha_bar = alpha_bars()[times]
    alpha_bar_next = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    posterior = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
    if len(times) > 1:
        posterior[-1] = posterior[-2]
    else:
        posterior = beta
    return Step(alpha_bar, alpha_bar_next, alpha, beta, beta.log(), posterior.log())


@cache
def _every_step(device: torch.device) -> Step:
    """Those from each time, 0 to 999, to the one before."""
    times = torch.arange(NUM_TIMES - 1, -1, -1, device="cpu")
    return Step(*(values.flip(0).to(device) for values in steps_between(times)))


def spaced_times(num_steps: int, spacing: str = "linspace") -> Tensor:
    """The falling times of a run of this many steps, (num_steps,), int64. The names are those of diffusers.

    linspace: evenly from 999 to 0, rounded; improved DDPM's and DiT's, for any number of steps.
    leading: multiples of 1000 / num_steps from 0 on, DDIM's (arXiv 2010.02502), which never sees the highest noise.
    trailing: the same, counted down from 999 (arXiv 2305.08891).

    Raises:
        UserError: an unknown spacing, more steps than times, or a number that does not divide 1000 where it must.
    """
    if spacing not in SPACINGS:
        raise UserError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if not isinstance(num_steps, int) or not 1 <= num_steps <= NUM_TIMES:
        raise UserError(f"num_steps must be a whole number from 1 to {NUM_TIMES}, the times of a model of noise, got "
                        f"{num_steps}")  # fmt: skip
    if spacing == "linspace":
        stride = (NUM_TIMES - 1) / max(1, num_steps - 1)
        # Added up, as the public code does: a product would round some halves the other way.
        places = accumulate([stride] * (num_steps - 1), initial=0.0)
        return torch.tensor([round(place) for place in places]).flip(0)
    if NUM_TIMES % num_steps:
        raise UserError(f"num_steps must divide {NUM_TIMES} with timestep_spacing {spacing}, got {num_steps}; linspace "
                        "takes any number")  # fmt: skip
    times = torch.arange(0, NUM_TIMES, NUM_TIMES // num_steps).flip(0)
    return times if spacing == "leading" else times + NUM_TIMES // num_steps - 1


# ---- training ----


def sample_times(
    batch: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Times to train at, (batch,), int64, uniform from 0 to 999."""
    return torch.randint(0, NUM_TIMES, (batch,), device=device, generator=generator)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε of x and ε (B, ...), t (B,) int64; typed as x.

    Raises:
        ValueError: a time that is not from 0 to 999, where seeing it takes no waiting for a GPU.
    """
    if t.device.type == "cpu" and ((t < 0) | (t >= NUM_TIMES)).any():
        raise ValueError(f"t must be whole numbers from 0 to {NUM_TIMES - 1}, got {t.tolist()}")
    alpha_bar = alpha_bars(t.device)[t].view(-1, *[1] * (x.dim() - 1))
    return alpha_bar.sqrt().to(x.dtype) * x + (1 - alpha_bar).sqrt().to(x.dtype) * noise


class NoiseTarget(NamedTuple):
    """What a prediction is compared with: x and ε, (B, C, ...), and the times (B,) int64."""

    x: Tensor
    noise: Tensor
    t: Tensor


def noise_loss(predicted: Tensor, target: NoiseTarget) -> Tensor:
    """The mean over the batch of mean (ε̂ − ε)² + L_vlb; a float32 scalar (float64 for float64).

    This is improved DDPM's L_hybrid as DiT trains it: L_vlb in bits per dimension, its weight 1, through u alone.

    Args:
        predicted: (B, 2·C, ...), ε̂ and u.

    Raises:
        ValueError: it does not have twice the channels of x.
    """
    wanted = (len(target.x), 2 * target.x.shape[1], *target.x.shape[2:])
    if predicted.shape != wanted:
        raise ValueError(f"predicted must have shape {wanted}, noise and variance of x, got {tuple(predicted.shape)}")
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    noise, range_position = predicted.chunk(2, dim=1)
    error = noise - target.noise
    bound = variational_bound(error.detach(), range_position, target)
    return (error.square().flatten(1).mean(dim=1) + bound).mean()


def variational_bound(error: Tensor, range_position: Tensor, target: NoiseTarget) -> Tensor:
    """The term of time t of the variational bound, in bits per dimension, (B,): the divergence of p(x_{t−1} | x_t) from
    q(x_{t−1} | x_t, x), and at t = 0 −log p(x | x_0) with x in the bins of 8-bit images.

    Args:
        error: ε̂ − ε, (B, C, ...). Both means are x_t/√α_t less a multiple of noise, so they differ by a multiple of it.
        range_position: u, (B, C, ...).
    """
    steps = _every_step(target.t.device)
    shape = (-1, *[1] * (error.dim() - 1))

    def at_times(table: Tensor) -> Tensor:
        return table[target.t].to(error.dtype).view(shape)

    log_beta, log_posterior = at_times(steps.log_beta), at_times(steps.log_posterior)
    log_variance = log_posterior + (range_position + 1) / 2 * (log_beta - log_posterior)
    of_mean = at_times(steps.beta / (steps.alpha * (1 - steps.alpha_bar)).sqrt()) * error
    divergence = 0.5 * (
        log_variance
        - log_posterior
        - 1
        + (log_posterior - log_variance).exp()
        + of_mean.square() * (-log_variance).exp()
    )
    bins = -_log_likelihood(target.x.to(error.dtype), of_mean, log_variance)
    first = (target.t == 0).view(shape)
    return torch.where(first, bins, divergence).flatten(1).mean(dim=1) / math.log(2)


def _log_likelihood(x: Tensor, centered: Tensor, log_variance: Tensor) -> Tensor:
    """log of a normal distribution's mass on the 8-bit bin of x in [−1, 1] (DDPM, eq. 13); the outermost are open.

    Args:
        centered: x less the mean.
    """
    scale = (-0.5 * log_variance).exp()
    above, below = _normal_cdf(scale * (centered + 1 / 255)), _normal_cdf(scale * (centered - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation by tanh of the public code, by which the published models were trained."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
