"""The samplers, one short function each: a coroutine that yields where it needs a velocity, and is sent it.

So one loop can evaluate several of them at once, each at its own time: `haste.samplers.parts`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from haste.errors import UserError
from haste.transport import score_from_velocity
from haste.validation import check_number, shown


class Request(NamedTuple):
    """A velocity that a sampler needs: of x (B, ...) float64 at time t, in its step number `step`, which starts at the
    time `start`, by which guidance goes. t and start are scalar tensors on the CPU."""

    x: Tensor
    t: Tensor
    start: Tensor
    step: int


Method: TypeAlias = Generator[Request, Tensor, Tensor]
"""A sampler at work: it yields a Request, is sent that velocity, as x, and returns the last state."""


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


SAMPLERS = ("euler", "heun", "euler-maruyama")


def begin(sampler: str, x: Tensor, grid: Tensor, step_noise: Iterator[Tensor], path: str) -> Method:
    """The sampler of that name at its first step; `step_noise` and `path` are of the SDE."""
    if sampler == "euler-maruyama":
        return euler_maruyama(x, grid, step_noise, path)
    return (heun if sampler == "heun" else euler)(x, grid)


def sde_drift(velocity: Tensor, x: Tensor, t: Tensor, path: str) -> Tensor:
    """v − g·s/2 with g = 2t.

    For given x it is affine in v, so the drift of a guided velocity is the guided drift.
    """
    return velocity - t * score_from_velocity(velocity, x, t, path)


def time_grid(sampler: str, num_steps: int) -> Tensor:
    """The num_steps + 1 times of a run, (num_steps + 1,), float64, on the CPU.

    ODE: evenly from 1 to 0. SDE: evenly from 1 to 0.04, then 0 in one step, as the score grows without bound.
    """
    if sampler == "euler-maruyama":
        return torch.cat([torch.linspace(1, 0.04, num_steps, dtype=torch.float64), torch.zeros(1).double()])
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def evaluations(sampler: str, num_steps: int) -> list[tuple[int, int]]:
    """For each velocity that a run needs its step and the index of its time on the grid.

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
    if sampler not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {shown(sampler)}")
    check_number("num_steps", num_steps, shown="num_steps")
