"""Guidance: of which model calls a velocity is made, and the list of all calls of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from haste._compat import version
from haste.errors import UserError
from haste.samplers.methods import evaluations, noise_share, time_grid
from haste.validation import check_number

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x, t, start), or noise, at x (B, ...) float64 and time t, in a step that starts at the share `start`
of the way from 0 (data) to 1 (noise), which decides whether it is guided; t and start are scalar tensors on the CPU."""

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
    channels: the first n are guided, the others are those of the condition; None guides all. Of a prediction of noise
        and variance the variance never is. others: scale of the other channels, such as a class token's.

    Raises UserError for settings that make no sense.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    mode: Literal["batched", "separate"] = "batched"
    channels: int | None = None
    others: float = 1.0

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
        """The guided prediction, in double precision, of a model that is called in `dtype`, at times that are at least
        float32: bfloat16 has no 999."""
        time_dtype = torch.promote_types(dtype, torch.float32)
        of_branches = {COND: condition}
        if null is not None:
            null = null.to(condition).expand_as(condition).contiguous()
            of_branches |= {UNCOND: null, BOTH: torch.cat([condition, null])}

        def velocity(x: Tensor, t: Tensor, start: Tensor) -> Tensor:
            rounded, outputs = x.to(dtype), []
            for branches in self.calls(start.item()):
                batch = rounded if len(branches) == 1 else torch.cat([rounded] * len(branches))
                v = model(batch, times_at(t.item(), len(batch), time_dtype, x.device), of_branches[branches])
                outputs += (v if isinstance(v, Tensor) else v[0]).double().chunk(len(branches))
            return outputs[0] if len(outputs) == 1 else self.combine(*outputs)

        return velocity

    def combine(self, v_cond: Tensor, v_uncond: Tensor) -> Tensor:
        """The guided velocity (B, C, ...)."""
        guided = v_uncond + self.scale * (v_cond - v_uncond)
        if self.channels is None:
            return guided
        others = v_cond if self.others == 1 else v_uncond + self.others * (v_cond - v_uncond)
        return torch.cat([guided[:, : self.channels], others[:, self.channels :]], dim=1)


class ModelCall(NamedTuple):
    """One call of the model. `step` counts the sampler's steps from 0; `position` is the index of `time` on its grid.

    Step and position differ in Heun's second call, which belongs to step i and looks at position i + 1.
    `branches` names the rows of the batch: ("cond",), ("uncond",), or ("cond", "uncond") in this order.
    """

    step: int
    position: int
    time: float
    branches: Branches = COND


def model_calls(
    sampler: str,
    num_steps: int,
    guidance: Guidance | None = None,
    timestep_spacing: str = "linspace",
    time_shift: float = 1.0,
    path: str = "linear",
) -> list[ModelCall]:
    """Every model call of a run, in order; guidance: None is none; the last three are as of `time_grid`.

    Raises:
        UserError: an unknown sampler, or a number of steps out of bounds.
    """
    of_step = evaluations(sampler, num_steps)
    grid = time_grid(sampler, num_steps, timestep_spacing, time_shift, path)
    starts, grid = noise_share(sampler, grid).tolist(), grid.tolist()
    listed = []
    for step, position in of_step:
        # Both of Heun's calls are guided alike: they must follow the same field.
        calls = (guidance or Guidance()).calls(starts[step])
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
