"""Images that are made in parts, one after the other or staggered, each part conditioned on those before it (xAR, arXiv
2502.20388, section 3).

A part begins when the one before it is done; or, staggered, a number of steps behind it. All parts in flight are then
one evaluation of the model, each at its own time, which a model can do that was trained with a time for each part. The
evaluations of a run follow from the settings alone (`plan_parts`). A round is one of them: rounds are what a run takes
one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.samplers.guidance import BOTH, COND, UNCOND, Branches, Guidance
from haste.samplers.methods import Method, Request, begin, choose_sampler, evaluations, time_grid
from haste.samplers.run import BEYOND, Generators, initial_noise, sample
from haste.transport import get_path
from haste.validation import DEFAULT_STEPS, check_number

# ---- what a family brings ----


class Engine(Protocol):
    """Evaluates the parts of a batch of images; it holds the model, the condition, and what it knows of parts that are
    done."""

    def velocities(
        self, first: int, states: Sequence[Tensor], times: Sequence[float], branches: Branches
    ) -> list[Tensor]:
        """The velocities of the parts first, first + 1, ... in flight, each at its own time.

        Args:
            first: all parts before it are done.
            states: of each part (B, n, d) float64, which the model is given in its own type.
            times: of each part; 0.0 for one that has reached it and waits for an earlier one.
            branches: ("cond",), ("uncond",), or ("cond", "uncond") in this order.

        Returns:
            Of each part (len(branches)·B, n, d), branch after branch.
        """

    def finish(self, part: int, state: Tensor) -> None:
        """Part number `part` is done, (B, n, d), and later parts are conditioned on it. Called in the order of the
        parts, and not for a part behind which nothing is left to do."""


class PartCall(NamedTuple):
    """What one part of the images takes of an evaluation.

    step: of the part's own steps, from 0. position: the index of `time` on its grid; the two differ in Heun's second
    call. branches: whose velocities the part needs; none if it has no steps left and waits for an earlier part.
    """

    part: int
    step: int
    position: int
    time: float
    branches: Branches


Found = list[dict[str, Tensor]]
"""Of each part in flight the velocities (B, n, d) by branch."""


def evaluate(engine: Engine, calls: Sequence[PartCall], states: Sequence[Tensor], separate: bool) -> Found:
    """Evaluate the parts in flight with the branches that any of them needs.

    Args:
        calls, states: of each of them, in order.
        separate: cond and uncond one after the other, as `Guidance.mode` has it.
    """
    found: Found = [{} for _ in calls]
    for branches in model_calls_of(calls, separate):
        velocities = engine.velocities(calls[0].part, states, [call.time for call in calls], branches)
        for of_part, velocity in zip(found, velocities, strict=True):
            of_part.update(zip(branches, velocity.tensor_split(len(branches)), strict=True))
    return found


def model_calls_of(calls: Sequence[PartCall], separate: bool) -> list[Branches]:
    """The branches of each model call that an evaluation of these parts takes."""
    if not any(UNCOND[0] in call.branches for call in calls):
        return [COND]
    return [COND, UNCOND] if separate else [BOTH]


class PartCache(nn.Module):
    """A model with a cache for images made in parts, given to a family's `sample` in place of the model, whose
    `sample_in_parts` passes it on to `Solver.parts`."""

    model: nn.Module

    def sample_in_parts(self, noise: Tensor, condition: Tensor, solve: Solver) -> Tensor:
        """The images (B, C, H, W) of noise, some of their velocities forecast."""
        return self.model.sample_in_parts(noise, condition, solve, self)

    def begin_parts(self, plan: Plan) -> None:
        """Begin a run of these rounds."""
        raise NotImplementedError

    def velocities(self, engine: Engine, calls: Sequence[PartCall], states: Sequence[Tensor], separate: bool) -> Found:
        """As `evaluate`, or forecast."""
        raise NotImplementedError


# ---- the plan of a run ----

Plan = Sequence[Sequence[PartCall]]
"""Of each round the calls of the parts in flight, which are consecutive ones."""


def plan_parts(
    sampler: str,
    part_steps: Sequence[int],
    stagger: int | None,
    guidance: Sequence[Guidance],
    time_shift: float = 1.0,
    path: str = "linear",
) -> Plan:
    """All evaluations of a run.

    Args:
        part_steps: the number of steps of each part.
        stagger: steps by which a part is behind the one before it, or that one's number if it has fewer: 0 is all at
            once. None: a part begins when the one before it is done.
        guidance: of each part.
        time_shift, path: as of `time_grid`.

    Raises:
        UserError: an unknown sampler, a number of steps or a stagger out of bounds, Heun's sampler staggered: its
            second call in a step is at the time of the next.
    """
    if sampler == "heun" and stagger is not None:
        raise UserError(f"stagger must be None for the sampler heun, got {stagger}")
    if stagger is not None:
        check_number("stagger", stagger, shown="stagger")
    calls = [
        _calls_of_part(part, sampler, time_grid(sampler, steps, time_shift=time_shift, path=path), guidance[part])
        for part, steps in enumerate(part_steps)
    ]
    begins = [0]
    for own in calls[:-1]:
        begins.append(begins[-1] + (len(own) if stagger is None else min(stagger, len(own))))
    plan = []
    for number in range(max(begun + len(own) for begun, own in zip(begins, calls, strict=True))):
        live = [part for part, own in enumerate(calls) if 0 <= number - begins[part] < len(own)]
        together = range(live[0], live[-1] + 1)
        plan.append([calls[k][number - begins[k]] if k in live else _waiting(calls[k]) for k in together])
    return plan


def _calls_of_part(part: int, sampler: str, grid: Tensor, guidance: Guidance) -> list[PartCall]:
    times = grid.tolist()
    branches = [COND if guidance.calls(time) == [COND] else BOTH for time in times]  # of a step that starts then
    listed = evaluations(sampler, len(times) - 1)
    return [PartCall(part, step, at, times[at], branches[step]) for step, at in listed]


def _waiting(calls: Sequence[PartCall]) -> PartCall:
    last = calls[-1]
    return PartCall(last.part, last.step + 1, last.position + 1, 0.0, ())


# ---- a run ----


@dataclass(kw_only=True)
class Solver:
    """A sampler with its settings, as a family's `sample` is given it: solve(model, noise, condition) for whole images,
    solve.parts(engine, noises, scales) for images in parts.

    Args:
        cfg_scale, sampler, num_steps, path, timestep_spacing, time_shift, guidance_low, guidance_high, guidance,
            guided_channels, others_scale, null, generator, progress, observe: as of `sample`. In parts progress counts
            rounds, and observe is called after every round with its number and all parts, in order, as (B, tokens, d).
        step_noise: as of `sample`; in parts all of the first part's, then all of the second's, ..., also if they are
            staggered. `generator` is drawn from in the same order.
        part_steps: the number of steps of each part; empty for num_steps each.
        stagger: as of `plan_parts`.

    Attributes:
        rounds, calls: of the last run in parts; a round is one call, or two with guidance in two calls. A cache goes
            without some of them, which its report has.
    """

    cfg_scale: float = 1.0
    step_noise: Iterable[Tensor] | None = None
    num_steps: int = DEFAULT_STEPS
    sampler: str | None = None
    path: str = "linear"
    timestep_spacing: str = "linspace"
    time_shift: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance: str = "batched"
    guided_channels: int | None = None
    others_scale: float = 1.0
    null: Tensor | int | None = None
    generator: Generators = None
    progress: Callable[[int, int], None] | None = None
    observe: Callable[[int, Tensor], None] | None = None
    part_steps: Sequence[int] = ()
    stagger: int | None = None

    def __post_init__(self) -> None:
        self.step_noise = None if self.step_noise is None else iter(self.step_noise)
        self.rounds = self.calls = 0

    def __call__(self, model: Callable, noise: Tensor, condition: Tensor, scale: float = 1.0) -> Tensor:
        """`sample` with these settings; `scale` multiplies cfg_scale − 1."""
        names = ("step_noise", "num_steps", "sampler", "path", "timestep_spacing", "time_shift", "guidance_low",
                 "guidance_high", "guidance", "guided_channels", "others_scale", "null", "generator", "progress",
                 "observe")  # fmt: skip
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        return sample(model, noise, condition, cfg_scale=self._scaled(scale), **settings)

    def _scaled(self, scale: float) -> float:
        return self.cfg_scale if scale == 1 else 1 + scale * (self.cfg_scale - 1)

    # ---- in parts ----

    def guidance_of(self, scales: Sequence[float]) -> list[Guidance]:
        """The guidance of each part, of scale 1 + scales[k]·(cfg_scale − 1): in xAR it grows from none, linearly."""
        check_number("cfg_scale", self.cfg_scale, shown="cfg_scale")  # as it was given, not as it is scaled
        interval = (self.guidance_low, self.guidance_high, self.guidance)
        return [Guidance(self._scaled(scale), *interval) for scale in scales]  # type: ignore[arg-type]

    def steps_of(self, parts: int) -> list[int]:
        """The number of steps of each part.

        Raises:
            UserError: part_steps has another number of parts.
        """
        if self.part_steps and len(self.part_steps) != parts:
            raise UserError(f"part_steps must have {parts} numbers, one for each part, got {len(self.part_steps)}")
        return list(self.part_steps) or [self.num_steps] * parts

    def plan(self, scales: Sequence[float]) -> Plan:
        """The rounds of a run of as many parts as there are scales. Raises UserError as `plan_parts` and `steps_of`."""
        sampler, guidance = choose_sampler("v", self.sampler), self.guidance_of(scales)
        return plan_parts(sampler, self.steps_of(len(scales)), self.stagger, guidance, self.time_shift, self.path)

    def times(self, scales: Sequence[float]) -> list[float]:
        """All times that a run of these parts evaluates at, falling, and 0.0, at which a part that is done conditions
        others."""
        return sorted({call.time for calls in self.plan(scales) for call in calls} | {0.0}, reverse=True)

    @torch.no_grad()
    def parts(
        self, engine: Engine, noises: Sequence[Tensor], scales: Sequence[float], cache: PartCache | None = None
    ) -> list[Tensor]:
        """Images from noise, part by part.

        Args:
            engine: evaluates the parts.
            noises: of each part (B, n, d), standard normal, of one type.
            scales: of each part's guidance: its scale is 1 + scales[k]·(cfg_scale − 1).
            cache: forecasts some of the velocities.

        Returns:
            The parts, as `noises`.

        Raises:
            UserError: settings that make no sense; a step that gave NaN or infinity, by its number and part.
            ValueError: shapes that do not fit, too little step_noise.
        """
        get_path(self.path)
        self._check(noises, scales)
        plan, guidance = self.plan(scales), self.guidance_of(scales)
        if cache is not None:
            cache.begin_parts(plan)
        methods = self._methods(noises)
        states = [noise.double() for noise in noises]
        requests = [next(method) for method in methods]
        finite: list[Tensor] = []
        for number, calls in enumerate(plan):
            asked = [requests[call.part].x if call.branches else states[call.part] for call in calls]
            args = (engine, calls, asked, self.guidance == "separate")
            found = evaluate(*args) if cache is None else cache.velocities(*args)
            for call, velocities in zip(calls, found, strict=True):
                if call.branches:
                    velocity = _guided(guidance[call.part], call, velocities)
                    finite.append(_send(methods, requests, states, call.part, velocity))
            self._finish(engine, plan, number, states, noises[0].dtype)
            if self.observe is not None:
                self.observe(number, torch.cat(states, dim=1))
            if self.progress is not None:
                self.progress(number + 1, len(plan))
        self.rounds = len(plan)
        self.calls = sum(len(model_calls_of(calls, self.guidance == "separate")) for calls in plan)
        _check_finite(finite, [call for calls in plan for call in calls if call.branches], self.steps_of(len(scales)))
        return [state.to(noise.dtype) for state, noise in zip(states, noises, strict=True)]

    def _check(self, noises: Sequence[Tensor], scales: Sequence[float]) -> None:
        if len(noises) != len(scales) or not scales:
            raise ValueError(f"scales must have one number for each of the {len(noises)} parts, got {len(scales)}")
        if self.guided_channels is not None:
            raise UserError(f"guided_channels must be None for images made in parts, got {self.guided_channels}")
        if self.cfg_scale > 1 and self.null is None:
            raise UserError(f"null must be the null condition for a cfg_scale of {self.cfg_scale}, got None")

    def _methods(self, noises: Sequence[Tensor]) -> list[Method]:
        counts, sampler = self.steps_of(len(noises)), choose_sampler("v", self.sampler)
        likes = [noise.double() for noise in noises]
        given = None if self.step_noise is None else iter(self.step_noise)
        kicks = _in_order(given, self.generator, likes, [steps - 1 for steps in counts])
        return [
            begin(sampler, like, time_grid(sampler, steps, "linspace", self.time_shift, self.path), own, self.path)
            for like, steps, own in zip(likes, counts, kicks, strict=True)
        ]

    def _finish(self, engine: Engine, plan: Plan, number: int, states: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Hand over the parts that were done with this round, if any are left."""
        if number + 1 < len(plan):
            for part in range(plan[number][0].part, plan[number + 1][0].part):
                engine.finish(part, states[part].to(dtype))


def _guided(guidance: Guidance, call: PartCall, velocities: dict[str, Tensor]) -> Tensor:
    own = [velocities[branch].double() for branch in call.branches]
    return own[0] if len(own) == 1 else guidance.combine(*own)


def _send(methods: list[Method], requests: list[Request], states: list[Tensor], part: int, velocity: Tensor) -> Tensor:
    """Advance one part by a velocity; whether what it led to is finite, as a tensor."""
    try:
        requests[part] = methods[part].send(velocity)
        reached = requests[part].x
    except StopIteration as end:
        reached = end.value
    states[part] = reached
    return reached.isfinite().all()


def _in_order(
    given: Iterator[Tensor] | None, generator: Generators, likes: Sequence[Tensor], counts: Sequence[int]
) -> list[Iterator[Tensor]]:
    """The noise of each part's steps: drawn for all steps of the first part, then of the second, and so on, in whatever
    order it is asked for. So staggered parts have the noise that they would have one after the other."""
    waiting: list[deque[Tensor]] = [deque() for _ in counts]
    owners = iter([part for part, count in enumerate(counts) for _ in range(count)])

    def draw(part: int) -> Tensor:
        like = likes[part]
        if given is None:
            return initial_noise(like.shape, generator, dtype=like.dtype, device=like.device)
        noise = next(given, None)
        if noise is None:
            raise ValueError("step_noise must have noise for every step of a part but its last, got less")
        if noise.shape != like.shape:
            raise ValueError(f"step_noise must have the shape of noise, {tuple(like.shape)}, got {tuple(noise.shape)}")
        return noise.to(like)

    def of(part: int) -> Iterator[Tensor]:
        while True:
            while not waiting[part]:
                owner = next(owners)
                waiting[owner].append(draw(owner))
            yield waiting[part].popleft()

    return [of(part) for part in range(len(counts))]


def _check_finite(finite: list[Tensor], calls: Sequence[PartCall], steps: Sequence[int]) -> None:
    """Raise UserError for the first call after which the state was not; a GPU is waited for once."""
    known = torch.stack(finite).tolist()
    if not all(known):
        call = calls[known.index(False)]
        raise UserError(f"step {call.step + 1} of {steps[call.part]} of part {call.part + 1} of {len(steps)}, at "
                        f"t = {call.time:.4g}, {BEYOND}")  # fmt: skip
