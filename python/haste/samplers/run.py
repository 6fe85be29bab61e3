"""A whole run of a sampler on a model.

Every random number can be given: the noise that a run begins with is an argument, and so is the noise of each step, so
a run from elsewhere is replayed number by number. The state is kept in double precision; the model is called in its
own type.

A model may have a method `start(calls)`, called once with the list of all model calls that will follow, by which
feature caching plans its full and skipped steps. `time_of` gives the value of the times that it is called with, and all
calls of the same branches have the same tensor as their condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from haste.errors import UserError
from haste.samplers.guidance import Guidance, Velocity, model_calls
from haste.samplers.methods import Method, begin, check_steps, choose_sampler, time_grid
from haste.transport import get_path
from haste.validation import DEFAULT_STEPS, check_number

BEYOND = (
    "gave NaN or infinity; the weights or the settings of the sampler are beyond what the model's number type holds"
)

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


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
    sampler: str | None = None,
    path: str = "linear",
    timestep_spacing: str = "linspace",
    time_shift: float = 1.0,
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    guidance: str = "batched",
    guided_channels: int | None = None,
    others_scale: float = 1.0,
    null: Tensor | int | None = None,
    generator: Generators = None,
    step_noise: Iterable[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images from noise.

    Args:
        model: called as model(x, t, condition) with x (B, ...), t (B,); returns the velocity, or a ModelOutput. If its
            attribute `prediction` is "noise", as DiT's, it returns noise and variance (B, 2·C, ...) at times 0 to 999.
            One that makes images in parts, such as xAR, samples them so, as a `Solver` with these settings has it.
        noise: (B, ...), standard normal.
        condition: (B, ...), such as classes (B,) int64.
        num_steps: steps. Euler and Euler–Maruyama call the model once per step, Heun twice but for the last.
        sampler: of a velocity "euler" (default) or "heun" for the ODE, "euler-maruyama" for the SDE; of noise "ddim"
            (default) or "ddpm".
        path: the path that a model of velocity was trained on, "linear" or "cosine".
        timestep_spacing: of a model of noise the times of the steps, as `haste.diffusion.spaced_times` has them.
        time_shift: of a model of velocity: the noise level of each step is that of even times multiplied by it, as
            `haste.transport.shift_time` has it; above 1 there are more steps near noise.
        cfg_scale: v = v_uncond + cfg_scale·(v_cond − v_uncond). At 1 there is no guidance, and no second half batch.
        guidance_low, guidance_high: a step is guided only if it starts at low ≤ t ≤ high (arXiv 2404.07724).
        guidance: "batched" computes both halves at once, "separate" one after the other, in half of the memory.
        guided_channels: the first n channels are guided. None: all, as HASTE and REPA do. SiT and DiT guide three of
            the four of their latents. DiT's variance is never guided.
        others_scale: cfg_scale of the other channels. A class token, of a model that denoises one, is behind the C·S·S
            numbers of the image.
        null: the condition of one image that stands for none (of classes: their number); needed for guidance.
        generator: for the noise of the steps of the SDE and DDPM; one for all, or one per image.
        step_noise: that noise itself, shaped as `noise`, for one step after the other; in place of `generator`. Read as
            float64. A run of n steps takes n − 1.
        progress: called after every step with the number of steps done and num_steps.
        observe: called after every step with its number, from 0, and the state, as `noise` but float64.

    Returns:
        As `noise`, in its type.

    Raises:
        UserError: a sampler or path that is unknown or of other models, settings that make no sense; a step that gave
            NaN or infinity, by its number.
        ValueError: shapes that do not fit, too little step_noise, a model in training mode.
    """
    prediction = "noise" if getattr(model, "prediction", None) == "noise" else "v"
    sampler = choose_sampler(prediction, sampler)
    _check(model, noise, condition, num_steps, sampler)
    get_path(path)
    check_number("time_shift", time_shift, shown="time_shift")
    if prediction == "v" and timestep_spacing != "linspace":
        raise UserError(
            f"timestep_spacing must be left out for a model that predicts a velocity, got {timestep_spacing}"
        )
    if prediction == "noise":
        if path != "linear":
            raise UserError(f"path must be left out for a model that predicts noise, got {path}")
        if time_shift != 1:
            raise UserError(f"time_shift must be left out for a model that predicts noise, got {time_shift}")
        if guided_channels is not None:
            check_number("guided_channels", guided_channels, shown="guided_channels")
        guided_channels = min(guided_channels or noise.shape[1], noise.shape[1])
    if hasattr(model, "sample_in_parts"):
        from haste.samplers.parts import Solver  # which is built on this file

        return model.sample_in_parts(noise, condition, Solver(
            cfg_scale=cfg_scale, step_noise=step_noise, num_steps=num_steps, sampler=sampler, path=path,
            timestep_spacing=timestep_spacing, time_shift=time_shift,
            guidance_low=guidance_low, guidance_high=guidance_high, guidance=guidance, guided_channels=guided_channels,
            null=null, generator=generator, progress=progress, observe=observe,
        ))  # fmt: skip
    guide = Guidance(cfg_scale, guidance_low, guidance_high, guidance, guided_channels, others_scale)  # type: ignore[arg-type]
    if cfg_scale == 1:
        null = None
    elif null is None:
        raise UserError(f"null must be the null condition for a cfg_scale of {cfg_scale}, got None")
    if hasattr(model, "start"):
        model.start(model_calls(sampler, num_steps, guide, timestep_spacing, time_shift, path))
    null = None if null is None else torch.as_tensor(null)
    velocity = guide.velocity(model, condition, null, getattr(model, "dtype", noise.dtype))
    x, finite = noise.double(), []
    grid = time_grid(sampler, num_steps, timestep_spacing, time_shift, path)
    method = begin(sampler, x, grid, _step_noise(step_noise, generator, x), path)
    for step, x in enumerate(states(method, velocity)):
        finite.append(x.isfinite().all())
        if observe is not None:
            observe(step, x)
        if progress is not None:
            progress(step + 1, num_steps)
    _check_finite(finite, grid)
    return x.to(noise.dtype)


def states(method: Method, velocity: Velocity) -> Iterator[Tensor]:
    """The state (B, ...) float64 after each step of a sampler in this velocity field."""
    request = next(method)
    while True:
        try:
            following = method.send(velocity(request.x, request.t, request.start))
        except StopIteration as end:
            yield end.value
            return
        if following.step != request.step:  # not between Heun's two calls
            yield following.x
        request = following


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
        raise UserError(f"step {step + 1} of {len(known)}, at t = {grid[step]:.4g}, {BEYOND}")


def _check(model: Callable, noise: Tensor, condition: Tensor, num_steps: int, sampler: str) -> None:
    check_steps(sampler, num_steps)
    if not isinstance(condition, Tensor):
        raise ValueError(f"condition must be a tensor, such as classes ({noise.shape[0]},), or of no class the null "
                         f"one, got {condition}")  # fmt: skip
    if condition.shape[:1] != noise.shape[:1]:
        shape = tuple(condition.shape)
        raise ValueError(f"condition must have as many rows as noise, {noise.shape[0]}, got shape {shape}")
    if getattr(model, "training", False):
        raise ValueError("model must be in eval mode, got training mode, which drops labels; call model.eval()")
