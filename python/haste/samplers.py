"""Samplers from t = 1 (noise) to t = 0 (data), with classifier-free guidance.

`euler`, `heun` and `euler_maruyama` are generators of the states that a velocity field leads through; `sample` runs one
of them on a model. Every random number can be given: the noise that a run begins with is an argument, and so is the
noise of each step, so a run from elsewhere is replayed number by number. The state is kept in double precision; the
model is called in its own type.

A model may have a method `start(calls)`, called once with the list of all model calls that will follow, by which
feature caching plans its full and skipped steps. `time_of` gives the value of the times that it is called with, and all
calls of the same branches have the same tensor as their condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from haste._compat import version
from haste.errors import UserError
from haste.transport import get_path, score_from_velocity
from haste.validation import DEFAULT_STEPS, check_number, shown

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x, t, start) at x (B, ...) float64 and time t, in a step that starts at the time `start`, which decides
whether it is guided; t and start are scalar tensors on the CPU."""

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None

# ---- the samplers ----


def euler(velocity: Velocity, x: Tensor, grid: Tensor) -> Iterator[Tensor]:
    """Euler's method for the probability-flow ODE dx = v dt (SiT, arXiv 2401.08740, eq. 2): one model call a step."""
    for t, t_next in pairwise(grid):
        x = x + (t_next - t) * velocity(x, t, t)
        yield x


def heun(velocity: Velocity, x: Tensor, grid: Tensor) -> Iterator[Tensor]:
    """Heun's method for the ODE (EDM, arXiv 2206.00364, algorithm 1 with v for its d): two calls a step, one in the
    last, which is Euler's."""
    last = len(grid) - 2
    for step, (t, t_next) in enumerate(pairwise(grid)):
        v = velocity(x, t, t)
        if step < last:
            v = (v + velocity(x + (t_next - t) * v, t_next, t)) / 2
        x = x + (t_next - t) * v
        yield x


def euler_maruyama(
    velocity: Velocity, x: Tensor, grid: Tensor, step_noise: Iterator[Tensor], path: str
) -> Iterator[Tensor]:
    """Euler–Maruyama for the SDE dx = (v − g·s/2) dt + √g dw̄ with g = 2t and the score s (SiT, eq. 4), which has the
    ODE's marginals. One call a step; the last, down to t = 0, adds no noise.

    step_noise: standard normal, shaped as x, for each other step.
    """
    last = len(grid) - 2
    for step, (t, t_next) in enumerate(pairwise(grid)):
        x = x + (t_next - t) * sde_drift(velocity(x, t, t), x, t, path)
        if step < last:
            x = x + (2 * t * (t - t_next)).sqrt() * next(step_noise)
        yield x


SAMPLERS = ("euler", "heun", "euler-maruyama")


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


# ---- guidance, and the model calls that it takes ----

Branches = tuple[str, ...]

COND: Branches = ("cond",)
UNCOND: Branches = ("uncond",)
BOTH: Branches = ("cond", "uncond")

MODES = ("batched", "separate")


@dataclass(frozen=True)
class Guidance:
    """v = v_uncond + scale·(v_cond − v_uncond) (arXiv 2207.12598), in steps that start at low ≤ t ≤ high only
    (arXiv 2404.07724).

    scale: 1 is none. mode: batched computes both halves as one batch of twice the size, separate one after the other.
    channels: the first n are guided, the others are those of the condition; None guides all.

    Raises UserError for settings that make no sense.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    mode: Literal["batched", "separate"] = "batched"
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("cfg_scale", self.scale), ("guidance_low", self.low), ("guidance_high", self.high)):
            check_number(name, value, shown=name)
        if not self.low <= self.high:
            raise UserError(f"guidance_low must be at most guidance_high, {self.high}, got {self.low}")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guided_channels must be at least 1, or None for all, got {self.channels}")
        if self.mode not in MODES:
            raise UserError(f"guidance must be {' or '.join(MODES)}, got {self.mode!r}")

    def calls(self, time: float) -> list[Branches]:
        """The branches of each model call that one velocity takes in a step that starts at `time`."""
        if self.scale == 1 or not self.low <= time <= self.high:
            return [COND]
        return [BOTH] if self.mode == "batched" else [COND, UNCOND]

    def velocity(self, model: Callable, condition: Tensor, null: Tensor | None, dtype: torch.dtype) -> Velocity:
        """The guided velocity field, in double precision, of a model that is called in `dtype`."""
        of_branches = {COND: condition}
        if null is not None:
            null = null.to(condition).expand_as(condition).contiguous()
            of_branches |= {UNCOND: null, BOTH: torch.cat([condition, null])}

        def velocity(x: Tensor, t: Tensor, start: Tensor) -> Tensor:
            rounded, outputs = x.to(dtype), []
            for branches in self.calls(start.item()):
                batch = rounded if len(branches) == 1 else torch.cat([rounded] * len(branches))
                v = model(batch, times_at(t.item(), len(batch), dtype, x.device), of_branches[branches])
                outputs += (v if isinstance(v, Tensor) else v[0]).double().chunk(len(branches))
            return outputs[0] if len(outputs) == 1 else self.combine(*outputs)

        return velocity

    def combine(self, v_cond: Tensor, v_uncond: Tensor) -> Tensor:
        """The guided velocity (B, C, ...)."""
        guided = v_uncond + self.scale * (v_cond - v_uncond)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], v_cond[:, self.channels :]], dim=1)


class ModelCall(NamedTuple):
    """One call of the model. `step` counts the sampler's steps from 0; `position` is the index of `time` on its grid.

    Step and position differ in Heun's second call, which belongs to step i and looks at position i + 1.
    `branches` names the rows of the batch: ("cond",), ("uncond",), or ("cond", "uncond") in this order.
    """

    step: int
    position: int
    time: float
    branches: Branches = COND


def model_calls(sampler: str, num_steps: int, guidance: Guidance | None = None) -> list[ModelCall]:
    """Every model call of a run, in order; guidance: None is none.

    Raises:
        UserError: an unknown sampler, or a number of steps out of bounds.
    """
    _check_steps(sampler, num_steps)
    grid = time_grid(sampler, num_steps).tolist()
    listed = []
    for step in range(num_steps):
        twice = sampler == "heun" and step < num_steps - 1  # the last step is Euler's
        # Both of Heun's calls are guided alike: they must follow the same field.
        calls = (guidance or Guidance()).calls(grid[step])
        for position in (step, step + 1) if twice else (step,):
            listed += [ModelCall(step, position, grid[position], branches) for branches in calls]
    return listed


def times_at(time: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor (count,) filled with `time`, which `time_of` returns without waiting for a GPU."""
    times = torch.full((count,), time, dtype=dtype, device=device)
    times._time_on_host = (time, version(times))
    return times


def time_of(times: Tensor) -> float | None:
    """The time that `times_at` was given; None for a tensor made otherwise, or written to since."""
    time, made = getattr(times, "_time_on_host", (None, None))
    return time if version(times) == made else None


# ---- a whole run ----


def initial_noise(
    shape: Sequence[int], generator: Generators = None, *, dtype: torch.dtype = torch.float32, device="cpu"
) -> Tensor:
    """Standard normal noise of `shape`, batch first.

    Args:
        generator: one for all, or one per image: then an image's noise does not depend on its place in a batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=source).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator must have one entry per image, {shape[0]}, got {len(generator)}")
    images = [torch.randn(tuple(shape[1:]), generator=g, dtype=dtype, device=g.device).to(device) for g in generator]
    return torch.stack(images) if images else torch.empty(tuple(shape), dtype=dtype, device=device)


@torch.no_grad()
def sample(
    model: Callable,
    noise: Tensor,
    condition: Tensor,
    *,
    num_steps: int = DEFAULT_STEPS,
    sampler: str = "euler",
    path: str = "linear",
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    guidance: str = "batched",
    guided_channels: int | None = None,
    null: Tensor | int | None = None,
    generator: Generators = None,
    step_noise: Iterable[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images from noise.

    Args:
        model: called as model(x, t, condition) with x (B, ...), t (B,); returns the velocity, or a ModelOutput.
        noise: (B, ...), standard normal.
        condition: (B, ...), such as classes (B,) int64.
        num_steps: steps. Euler and Euler–Maruyama call the model once per step, Heun twice but for the last.
        sampler: "euler" or "heun" for the ODE, "euler-maruyama" for the SDE.
        path: the path that the model was trained on, "linear" or "cosine".
        cfg_scale: v = v_uncond + cfg_scale·(v_cond − v_uncond). At 1 there is no guidance, and no second half batch.
        guidance_low, guidance_high: a step is guided only if it starts at low ≤ t ≤ high (arXiv 2404.07724).
        guidance: "batched" computes both halves at once, "separate" one after the other, in half of the memory.
        guided_channels: the first n channels are guided. None: all, as HASTE and REPA do. SiT and DiT guide three of
            the four of their latents.
        null: the condition of one image that stands for none (of classes: their number); needed for guidance.
        generator: for the noise of the SDE's steps; one for all, or one per image.
        step_noise: that noise itself, shaped as `noise`, for one step after the other; in place of `generator`. Read as
            float64. A run of n steps takes n − 1.
        progress: called after every step with the number of steps done and num_steps.
        observe: called after every step with its number, from 0, and the state, as `noise` but float64.

    Returns:
        As `noise`, in its type.

    Raises:
        UserError: an unknown sampler or path, settings that make no sense; a step that gave NaN or infinity, by its
            number.
        ValueError: shapes that do not fit, too little step_noise, a model in training mode.
    """
    _check(model, noise, condition, num_steps, sampler)
    get_path(path)
    guide = Guidance(cfg_scale, guidance_low, guidance_high, guidance, guided_channels)  # type: ignore[arg-type]
    if cfg_scale == 1:
        null = None
    elif null is None:
        raise UserError(f"null must be the null condition for a cfg_scale of {cfg_scale}, got None")
    if hasattr(model, "start"):
        model.start(model_calls(sampler, num_steps, guide))
    null = None if null is None else torch.as_tensor(null)
    velocity = guide.velocity(model, condition, null, getattr(model, "dtype", noise.dtype))
    x, grid, finite = noise.double(), time_grid(sampler, num_steps), []
    if sampler == "euler-maruyama":
        states = euler_maruyama(velocity, x, grid, _step_noise(step_noise, generator, x), path)
    else:
        states = (heun if sampler == "heun" else euler)(velocity, x, grid)
    for step, x in enumerate(states):
        finite.append(x.isfinite().all())
        if observe is not None:
            observe(step, x)
        if progress is not None:
            progress(step + 1, num_steps)
    _check_finite(finite, grid)
    return x.to(noise.dtype)


def solver(
    cfg_scale: float = 1.0, step_noise: Iterable[Tensor] | None = None, **settings: Any
) -> Callable[..., Tensor]:
    """`sample` with these settings as a family's own `sample` calls it, once for each part of an image:
    solve(model, noise, condition, scale=1.0), where `scale` multiplies cfg_scale − 1."""
    rest = None if step_noise is None else iter(step_noise)

    def solve(model: Callable, noise: Tensor, condition: Tensor, scale: float = 1.0) -> Tensor:
        guided = cfg_scale if scale == 1 else 1 + scale * (cfg_scale - 1)
        return sample(model, noise, condition, cfg_scale=guided, step_noise=rest, **settings)

    return solve


def _step_noise(given: Iterable[Tensor] | None, generator: Generators, like: Tensor) -> Iterator[Tensor]:
    if given is None:
        while True:
            yield initial_noise(like.shape, generator, dtype=like.dtype, device=like.device)
    for noise in given:
        if noise.shape != like.shape:
            raise ValueError(f"step_noise must have the shape of noise, {tuple(like.shape)}, got {tuple(noise.shape)}")
        yield noise.to(like)
    raise ValueError("step_noise must have noise for every step but the last, got less")


def _check_finite(finite: list[Tensor], grid: Tensor) -> None:
    """Raise UserError for the first step whose `finite` is false; a GPU is waited for once, after the last step."""
    known = torch.stack(finite).tolist()
    if not all(known):
        step = known.index(False)
        raise UserError(
            f"step {step + 1} of {len(known)}, at t = {grid[step]:.4g}, gave NaN or infinity; the weights or the "
            "settings of the sampler are beyond what the model's number type holds"
        )


def _check_steps(sampler: str, num_steps: int) -> None:
    if sampler not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {shown(sampler)}")
    check_number("num_steps", num_steps, shown="num_steps")


def _check(model: Callable, noise: Tensor, condition: Tensor, num_steps: int, sampler: str) -> None:
    _check_steps(sampler, num_steps)
    if condition.shape[:1] != noise.shape[:1]:
        shape = tuple(condition.shape)
        raise ValueError(f"condition must have as many rows as noise, {noise.shape[0]}, got shape {shape}")
    if getattr(model, "training", False):
        raise ValueError("model must be in eval mode, got training mode, which drops labels; call model.eval()")
