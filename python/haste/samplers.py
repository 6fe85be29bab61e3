"""Classifier-free guidance: when it is on, and how its two halves are evaluated.

v = v_null + scale·(v_label − v_null)  (arXiv 2207.12598), only while low ≤ t ≤ high  (arXiv 2404.07724).

Times that a sampler makes, which know their value on the host: to ask a tensor on a GPU for it is to wait for it.

Euler, Heun and Euler-Maruyama, from t = 1 (noise) to t = 0 (data), with classifier-free guidance.

The probability-flow ODE  dx = v dt  and the SDE  dx = (v − g·s/2) dt + √g dw̄,  g = 2t,  have the same marginals
(SiT, arXiv 2401.08740, eqs. 2 and 4); s is the score, which follows from v. The state is kept in double precision;
the model is called in its own type.

A model may have a method `start(evaluations)`. It is called once, before the first evaluation, with the list of all
that will follow: what feature caching plans its full and its skipped steps by. The times that it is called with
tell their value to `haste.samplers.time_of`, and all calls of the same branches have the same tensor of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from haste.errors import UserError
from haste.transport import get_path, score_from_velocity
from haste.validation import DEFAULT_STEPS, check_number

Branches = tuple[str, ...]

LABEL: Branches = ("label",)
NULL: Branches = ("null",)
BOTH: Branches = ("label", "null")

MODES = ("batched", "separate")


@dataclass(frozen=True)
class Guidance:
    """scale: 1 is none. low, high: a step is guided only if it starts at low ≤ t ≤ high. null_label: the class that
    stands for none. mode: batched evaluates both halves as one batch of twice the size, separate one after the other.
    channels: so many, the first ones, are guided and the others are those of the label; None guides all.

    Raises UserError for settings that make no sense.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    null_label: int | None = None
    mode: Literal["batched", "separate"] = "batched"
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("cfg_scale", self.scale), ("guidance_low", self.low), ("guidance_high", self.high)):
            check_number(name, value, shown=name)
        if self.scale > 1 and self.null_label is None:
            raise UserError(f"cfg_scale is {self.scale}, so null_label must be given: the class that stands for none")
        if not self.low <= self.high:
            raise UserError(f"guidance_low is {self.low}; it must not be above guidance_high, {self.high}")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guided_channels must be at least 1, or None for all, got {self.channels}")
        if self.mode not in MODES:
            raise UserError(f"guidance is {self.mode!r}; it must be {' or '.join(MODES)}")

    def calls(self, time: float) -> list[Branches]:
        """The calls of the model that one velocity takes in a step that starts at `time`, each by its branches."""
        if self.scale == 1 or not self.low <= time <= self.high:
            return [LABEL]
        return [BOTH] if self.mode == "batched" else [LABEL, NULL]

    def combine(self, v_label: Tensor, v_null: Tensor) -> Tensor:
        """The guided velocity (B, C, S, S) of that of the label and that of none."""
        guided = v_null + self.scale * (v_label - v_null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], v_label[:, self.channels :]], dim=1)


def times_at(time: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,), each of them `time`, which `time_of` gives back."""
    times = torch.full((count,), time, dtype=dtype, device=device)
    times._time_on_host = (time, version(times))
    return times


def time_of(times: Tensor) -> float | None:
    """The time that `times_at` was given; None for a tensor made otherwise, or written to since."""
    time, made = getattr(times, "_time_on_host", (None, None))
    return time if version(times) == made else None


def version(tensor: Tensor) -> int | None:
    """It changes when the tensor is written to. None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


SAMPLERS = ("euler", "heun", "euler-maruyama")

Generators = torch.Generator | Sequence[torch.Generator] | None


class ModelCall(NamedTuple):
    """One call of the model. `step` counts the sampler's steps from 0; `position` is the index of `time` on its grid.

    Step and position differ in Heun's second evaluation, which belongs to step i and looks at position i + 1.
    `branches` tells whose rows the batch holds: "label", "null", or first the one and then the other.
    """

    step: int
    position: int
    time: float
    branches: Branches = LABEL


def model_calls(sampler: str, num_steps: int, guidance: Guidance | None = None) -> list[ModelCall]:
    """Every evaluation of a run, in order; guidance: None is none."""
    grid = time_grid(sampler, num_steps).tolist()
    listed = []
    for step in range(num_steps):
        heun = sampler == "heun" and step < num_steps - 1  # the last step is Euler's
        # One answer for both of Heun's evaluations: they must follow the same field.
        calls = (guidance or Guidance()).calls(grid[step])
        for position in (step, step + 1) if heun else (step,):
            listed += [ModelCall(step, position, grid[position], branches) for branches in calls]
    return listed


def time_grid(sampler: str, num_steps: int) -> Tensor:
    """The num_steps + 1 times of a run, (num_steps + 1,), float64, on the CPU.

    ODE: evenly from 1 to 0. SDE: evenly from 1 to 0.04, then 0 in one step, as the score grows without bound.
    """
    if sampler == "euler-maruyama":
        return torch.cat([torch.linspace(1, 0.04, num_steps, dtype=torch.float64), torch.zeros(1).double()])
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


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
        raise ValueError(f"generator has {len(generator)} entries; it must have one per image, {shape[0]}")
    images = [torch.randn(tuple(shape[1:]), generator=g, dtype=dtype, device=g.device).to(device) for g in generator]
    return torch.stack(images) if images else torch.empty(tuple(shape), dtype=dtype, device=device)


@torch.no_grad()
def sample(
    model: Callable,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int = DEFAULT_STEPS,
    sampler: str = "euler",
    path: str = "linear",
    cfg_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    guidance: str = "batched",
    guided_channels: int | None = None,
    null_label: int | None = None,
    generator: Generators = None,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images from noise.

    Args:
        model: called as model(x, t, y) with x (B, C, S, S), t (B,), y (B,); returns the velocity, or a SiTOutput.
        noise: (B, C, S, S), standard normal.
        labels: (B,), int64.
        num_steps: steps. Euler and Euler-Maruyama call the model once per step, Heun twice but for the last.
        sampler: "euler" or "heun" for the ODE, "euler-maruyama" for the SDE.
        path: the path that the model was trained on, "linear" or "cosine".
        cfg_scale: v = v_null + cfg_scale·(v_label − v_null). At 1 there is no guidance and no second half of a batch.
        guidance_low, guidance_high: a step is guided only if it starts at low ≤ t ≤ high (arXiv 2404.07724).
        guidance: "batched" evaluates both halves at once, "separate" one after the other, in half of the memory.
        guided_channels: so many channels, the first ones, are guided. None: all, as HASTE and REPA do. SiT and DiT
            guide three of the four of their latents.
        null_label: the class that stands for none (SiT: num_classes); needed for guidance.
        generator: for the noise of the SDE; one for all, or one per image.
        progress: called after every step with the number of steps done and num_steps.
        observe: called after every step with its number, from 0, and the state (B, C, S, S), float64.

    Returns:
        (B, C, S, S), in the type of `noise`.

    Raises:
        UserError: an unknown sampler or path, settings that make no sense; a step that gave NaN or infinity, by its
            number.
        ValueError: shapes that do not fit, a model in training mode.
    """
    _check(model, noise, labels, num_steps, sampler)
    get_path(path)
    guided = Guidance(cfg_scale, guidance_low, guidance_high, null_label, guidance, guided_channels)
    if hasattr(model, "start"):
        model.start(model_calls(sampler, num_steps, guided))
    velocity = _guided_velocity(model, labels, guided, getattr(model, "dtype", noise.dtype))
    x = noise.double()
    grid = time_grid(sampler, num_steps)
    finite = []
    for step in range(num_steps):
        t, t_next = grid[step], grid[step + 1]
        last = step == num_steps - 1
        calls = guided.calls(t.item())
        v = velocity(x, t, calls)
        if sampler == "euler-maruyama":
            x = x + (t_next - t) * sde_drift(v, x, t, path)
            if not last:
                x = x + (2 * t * (t - t_next)).sqrt() * initial_noise(
                    x.shape, generator, dtype=torch.float64, device=x.device
                )
        elif sampler == "heun" and not last:
            v_next = velocity(x + (t_next - t) * v, t_next, calls)
            x = x + (t_next - t) * (v + v_next) / 2
        else:
            x = x + (t_next - t) * v
        finite.append(x.isfinite().all())
        if observe is not None:
            observe(step, x)
        if progress is not None:
            progress(step + 1, num_steps)
    _check_finite(finite, grid)
    return x.to(noise.dtype)


def _guided_velocity(
    model: Callable, labels: Tensor, guidance: Guidance, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, list[Branches]], Tensor]:
    """velocity(x, t, calls) in double precision; `dtype` is the type that the model wants (without one of its own, as a
    function or a DDP wrapper, that of the noise)."""
    of_branches = {LABEL: labels}
    if guidance.scale > 1:
        null = torch.full_like(labels, guidance.null_label)
        of_branches |= {NULL: null, BOTH: torch.cat([labels, null])}

    def velocity(x: Tensor, t: Tensor, calls: list[Branches]) -> Tensor:
        rounded, outputs = x.to(dtype), []
        for branches in calls:
            batch = rounded if len(branches) == 1 else torch.cat([rounded] * len(branches))
            v = model(batch, times_at(t.item(), len(batch), dtype, x.device), of_branches[branches])
            outputs += (v if isinstance(v, Tensor) else v[0]).double().chunk(len(branches))
        if len(outputs) == 1:
            return outputs[0]
        v_label, v_null = outputs
        return guidance.combine(v_label, v_null)

    return velocity


def _check_finite(finite: list[Tensor], grid: Tensor) -> None:
    """UserError for the first step of which `finite` is false: asked of a GPU once, after the last step."""
    known = torch.stack(finite).tolist()
    if not all(known):
        step = known.index(False)
        raise UserError(
            f"step {step + 1} of {len(known)}, at t = {grid[step]:.4g}, gave NaN or infinity; the weights or the "
            "settings of the sampler are beyond what the model's number type holds"
        )


def sde_drift(velocity: Tensor, x: Tensor, t: Tensor, path: str) -> Tensor:
    """v − g·s/2 with g = 2t.

    For given x it is affine in v, so the drift of a guided velocity is the guided drift.
    """
    return velocity - t * score_from_velocity(velocity, x, t, path)


def _check(model: Callable, noise: Tensor, labels: Tensor, num_steps: int, sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    check_number("num_steps", num_steps, shown="num_steps")
    if labels.shape != noise.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be ({noise.shape[0]},), as noise")
    if getattr(model, "training", False):
        raise ValueError("model is in training mode, where it drops labels at random; call model.eval() first")
