"""The samplers, one short function each: a coroutine that yields where it needs the model's prediction, and is sent it.

So one loop can evaluate several of them at once, each at its own time: `haste.samplers.parts`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from haste.diffusion import NUM_TIMES, Step, spaced_times, steps_between
from haste.errors import UserError
from haste.transport import score_from_velocity, shift_time
from haste.validation import check_number, shown


class Request(NamedTuple):
    """A prediction that a sampler needs, a velocity or noise: of x (B, ...) float64 at time t, in its step number
    `step`, which starts at the share `start` of the way from 0 (data) to 1 (noise), by which guidance goes. t and start
    are scalar tensors on the CPU."""

    x: Tensor
    t: Tensor
    start: Tensor
    step: int


Method: TypeAlias = Generator[Request, Tensor, Tensor]
"""A sampler at work: it yields a Request, is sent that prediction, and returns the last state."""


# ---- of a velocity, shaped as x ----


def euler(x: Tensor, grid: Tensor) -> Method:
    """Euler's method for the probability-flow ODE dx = v dt (SiT, arXiv 2401.08740, eq. 2): one model call a step.

    Args:
        x: (B, ...) float64. grid: as of `time_grid`.
    """
    for step, (t, t_next) in enumerate(pairwise(grid)):
        v = yield Request(x, t, t, step)
        x = x + (t_next - t) * v
    return x


def heun(x: Tensor, grid: Tensor) -> Method:
    """Heun's method for the ODE (EDM, arXiv 2206.00364, algorithm 1 with v for its d): two calls a step, one in the
    last, which is Euler's.

    Args:
        x: (B, ...) float64. grid: as of `time_grid`.
    """
    last = len(grid) - 2
    for step, (t, t_next) in enumerate(pairwise(grid)):
        v = yield Request(x, t, t, step)
        if step < last:
            v_next = yield Request(x + (t_next - t) * v, t_next, t, step)
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


def euler_maruyama(x: Tensor, grid: Tensor, step_noise: Iterator[Tensor], path: str) -> Method:
    """Euler–Maruyama for the SDE dx = (v − g·s/2) dt + √g dw̄ with g = 2t and the score s (SiT, eq. 4), which has the
    ODE's marginals. One call a step; the last, down to t = 0, adds no noise.

    Args:
        x: (B, ...) float64. grid: as of `time_grid`.
        step_noise: standard normal, shaped as x, for each other step.
        path: "linear" or "cosine".
    """
    last = len(grid) - 2
    for step, (t, t_next) in enumerate(pairwise(grid)):
        v = yield Request(x, t, t, step)
        x = x + (t_next - t) * sde_drift(v, x, t, path)
        if step < last:
            x = x + (2 * t * (t - t_next)).sqrt() * next(step_noise)
    return x


# ---- of noise and variance, (B, 2·C, ...) for x (B, C, ...) ----


def ddim(x: Tensor, grid: Tensor) -> Method:
    """DDIM without noise (arXiv 2010.02502, eq. 12 with σ = 0): one model call a step. The variance is not read.

    Args:
        x: (B, C, ...) float64. grid: as of `time_grid`.
    """
    steps = steps_between(grid[:-1].long())
    for step, t in enumerate(grid[:-1]):
        noise = (yield Request(x, t, noise_share("ddim", t), step))[:, : x.shape[1]]
        alpha_bar, alpha_bar_next = steps.alpha_bar[step], steps.alpha_bar_next[step]
        clean = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        x = alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next).sqrt() * noise
    return x


def ddpm(x: Tensor, grid: Tensor, step_noise: Iterator[Tensor]) -> Method:
    """DDPM (arXiv 2006.11239, algorithm 2) of the process respaced to the grid, with the variance that the model has
    learned (improved DDPM, arXiv 2102.09672, eq. 15). One model call a step; the last adds no noise.

    Args:
        x: (B, C, ...) float64. grid: as of `time_grid`.
        step_noise: standard normal, shaped as x, for each other step.
    """
    steps, last = steps_between(grid[:-1].long()), len(grid) - 2
    for step, t in enumerate(grid[:-1]):
        predicted = yield Request(x, t, noise_share("ddpm", t), step)
        if predicted.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"the prediction must have {2 * x.shape[1]} channels for ddpm, noise and variance, got "
                             f"{predicted.shape[1]}; ddim needs no variance")  # fmt: skip
        noise, position = predicted.split(x.shape[1], dim=1)
        at = Step(*(values[step] for values in steps))
        x = (x - at.beta / (1 - at.alpha_bar).sqrt() * noise) / at.alpha.sqrt()
        if step < last:
            log_variance = at.log_posterior + (position + 1) / 2 * (at.log_beta - at.log_posterior)
            x = x + (0.5 * log_variance).exp() * next(step_noise)
    return x


# ---- by name ----

SAMPLERS = {"v": ("euler", "heun", "euler-maruyama"), "noise": ("ddim", "ddpm")}
"""The samplers of models by what these predict; the first of each is the default."""


def begin(sampler: str, x: Tensor, grid: Tensor, step_noise: Iterator[Tensor], path: str) -> Method:
    """The sampler of that name at its first step; `step_noise` is of those that add noise, `path` of the SDE."""
    if sampler == "euler-maruyama":
        return euler_maruyama(x, grid, step_noise, path)
    if sampler == "ddpm":
        return ddpm(x, grid, step_noise)
    return {"heun": heun, "ddim": ddim}.get(sampler, euler)(x, grid)


def noise_share(sampler: str, time: Tensor) -> Tensor:
    """Where a time of a sampler lies from 0 (data) to 1 (noise)."""
    return (time + 1) / NUM_TIMES if sampler in SAMPLERS["noise"] else time


def sde_drift(velocity: Tensor, x: Tensor, t: Tensor, path: str) -> Tensor:
    """v − g·s/2 with g = 2t.

    For given x it is affine in v, so the drift of a guided velocity is the guided drift.
    """
    return velocity - t * score_from_velocity(velocity, x, t, path)


LAST_OF_SDE = 0.04  # the time of its last step, as the score grows without bound towards 0


def time_grid(
    sampler: str, num_steps: int, timestep_spacing: str = "linspace", time_shift: float = 1.0, path: str = "linear"
) -> Tensor:
    """The num_steps + 1 times of a run, (num_steps + 1,), float64, on the CPU.

    ODE: evenly from 1 to 0. SDE: evenly from 1 to 0.04, then 0 in one step. Both are even before `shift_time` moves
    them; the SDE's still end at 0.04, so that its last step is as short with any shift.
    DDIM and DDPM: the times of `haste.diffusion.spaced_times`, then -1 for data.
    """
    if sampler in SAMPLERS["noise"]:
        return torch.cat([spaced_times(num_steps, timestep_spacing).double(), -torch.ones(1).double()])
    if sampler == "euler-maruyama":
        last = shift_time(torch.tensor(LAST_OF_SDE, dtype=torch.float64), 1 / time_shift, path).item()
        even = torch.linspace(1, last, num_steps, dtype=torch.float64)
        return torch.cat([shift_time(even, time_shift, path), torch.zeros(1).double()])
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), time_shift, path)


def evaluations(sampler: str, num_steps: int) -> list[tuple[int, int]]:
    """For each prediction that a run needs its step and the index of its time on the grid.

    Raises:
        UserError: an unknown sampler, or a number of steps out of bounds.
    """
    check_steps(sampler, num_steps)
    listed = []
    for step in range(num_steps):
        twice = sampler == "heun" and step < num_steps - 1  # the last step is Euler's
        listed += [(step, position) for position in ((step, step + 1) if twice else (step,))]
    return listed


def check_steps(sampler: str, num_steps: int) -> None:
    """Raise UserError for an unknown sampler, or a number of steps out of bounds."""
    known = [name for names in SAMPLERS.values() for name in names]
    if sampler not in known:
        raise UserError(f"sampler must be one of {', '.join(known)}, got {shown(sampler)}")
    check_number("num_steps", num_steps, shown="num_steps")


def choose_sampler(prediction: str, sampler: str | None) -> str:
    """The sampler of a model that predicts this; None is its default.

    Raises:
        UserError: a sampler of other models.
    """
    own = SAMPLERS[prediction]
    if sampler is None:
        return own[0]
    if sampler not in own:
        what = "noise" if prediction == "noise" else "a velocity"
        known = ", ".join(own)
        raise UserError(f"sampler must be one of {known} for a model that predicts {what}, got {shown(sampler)}")
    return sampler
