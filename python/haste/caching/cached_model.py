"""What skipped evaluations add to their tokens, made for all of them up to the next full one when the first one asks.

It depends on the snapshots, the forecast's weights, the labels and the evaluation's time, and not on the image. One
pass over the snapshots serves several evaluations then, and kept is one (B, N, D) for each: beside the snapshots of all
modules, little.

Made ahead are those of evaluations whose time and labels are known: `haste.sampling.sample` tells both. In any other
loop they may be others than the run's plan has, and to compare tensors on a GPU is to wait for it: there, every
evaluation makes its own. The parameters of the model are not looked at; they must not change between two full steps.

A model of which most evaluations in a sampling run are not computed in full.

Three small pieces decide everything: a schedule, which steps are full; a forecaster, how the others are predicted; and
regions, what of the model is predicted. The model itself is not touched.

    fast = wrap(model, num_steps=50)     # settings as of `haste sample`; then call fast(x, t, y) in your own loop
    model = unwrap(fast)
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from haste.caching.adapters import CacheGranularity, PublicTransformer, Transformer
from haste.caching.forecaster import Forecaster, Place, SnapshotRing
from haste.caching.schedule import Clock, Course, Plan, Schedule
from haste.errors import UserError
from haste.samplers import Branches, ModelCall, time_of, version

logger = logging.getLogger(__name__)

MOST_AHEAD = 8  # evaluations: what one pass makes on a GPU; it bounds the memory too


class Correction(NamedTuple):
    """Of one evaluation: what it adds to its tokens (B, N, D), and its conditioning (B, D)."""

    added: Tensor
    c: Tensor


@dataclass(frozen=True, eq=False)
class Labels:
    """A tensor of labels as it was at a call. It is known again by what it is, not by its values."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, y: Tensor) -> Labels:
        return cls(y, version(y))

    def are(self, other: Labels) -> bool:
        return self.tensor is other.tensor and self.version == other.version


class Corrections:
    """Those of the evaluations to come, by the guidance branches in their rows, their labels and place in the run.

    Attributes:
        most_bytes: the most that was held at once since `start`.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.clear()
        self.most_bytes = 0

    def clear(self) -> None:
        """When a snapshot is taken: what was made without it is no longer wanted."""
        self._held: dict[Branches, tuple[Labels, dict[Place, Correction]]] = {}

    def get(self, branches: Branches, labels: Labels, place: Place) -> Correction | None:
        if branches not in self._held:
            return None
        made_for, corrections = self._held[branches]
        return corrections.get(place) if made_for.are(labels) else None

    def keep(self, branches: Branches, labels: Labels, corrections: dict[Place, Correction]) -> None:
        """What these branches had is forgotten. labels: of the whole call, of which the branches may be one half."""
        self._held[branches] = labels, corrections
        held = (tensor for _, of in self._held.values() for correction in of.values() for tensor in correction)
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in held))


MOST_COMPILATIONS = 1000


class CachedModel(nn.Module):
    """Called like the model that it wraps, for sampling, and returns what that returns.

    Every run begins with `start`; `haste.sampling.sample` sees to that. Which evaluation of the run a call is, its
    time tells (see `Clock`). Where there is nothing to forecast from, as when another batch arrives, or guidance comes
    back on and its null half has no history, the step is full whatever the schedule says.

    Args:
        model: the model; its answer is made through `transformer`, how a cache sees it.
        schedule, forecaster: which steps, and how.
        regions: what is cached. Of several, `region_of(step, num_steps)` gives the number of the one in use, and a full
            step is forced where it changes.

    Attributes:
        num_full, num_forecast: evaluations so far in this run.
        full_steps: the steps so far that were full.
    """

    def __init__(
        self,
        model: nn.Module,
        transformer: Transformer,
        schedule: Schedule,
        forecaster: Forecaster,
        regions: Sequence[CacheGranularity],
        region_of: Callable[[int, int], int] = lambda step, num_steps: 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.transformer = transformer
        self.schedule = schedule
        self.forecaster = forecaster
        self.regions = regions
        self.region_of = region_of
        self._ring = SnapshotRing(regions[0].modules, forecaster.order + 1)
        self._corrections = Corrections()
        self._evaluations = [_Evaluations(transformer, region) for region in regions]
        self._functions = [evaluations.functions for evaluations in self._evaluations]
        self._clock: Clock | None = None
        self._warned = False  # of a run that ended before its plan
        self.training = model.training  # and every part of the model stays in its own mode

    # -- what a caller sees of the model ------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def cache_bytes(self) -> int:
        """What the snapshots take, once there are some, and the most that was made ahead of time in this run."""
        return self._ring.bytes + self._corrections.most_bytes

    def __getattr__(self, name: str) -> Any:
        """The model's own attributes. Its methods, such as DiT's forward_with_cfg, run on the cached model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("model"), name)
        if isinstance(value, types.MethodType) and value.__self__ is self.model:
            return types.MethodType(value.__func__, self)
        return value

    def compile(self, **options: Any) -> CachedModel:
        """Compiles both kinds of evaluation, each without a graph break; options as of torch.compile.

        The first batch size has kernels of its own; from the second on they serve any.

        What is made for several skipped evaluations at once is not compiled: it is little besides one kernel, and every
        number of them would be another compilation.
        """
        options = {"fullgraph": True, **options}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # all cached models of a process count
            options.setdefault("recompile_limit", MOST_COMPILATIONS)
        self._functions = [
            {name: torch.compile(function, **options) for name, function in functions.items()}
            for functions in self._functions
        ]
        return self

    def capture(self) -> CachedModel:
        """Has both kinds of evaluation captured in CUDA graphs when they are first run, and replayed from then on; but
        not what is made for several at once, as with `compile`."""
        from haste.caching.cuda_graphs import GRAPHED

        device = next(self.model.parameters()).device
        if device.type != "cuda":
            raise UserError(f"the model is on {device}; it must be on a GPU for CUDA graphs")
        self._functions = [
            {name: GRAPHED[name](function) for name, function in functions.items()} for functions in self._functions
        ]
        return self

    def release(self) -> None:
        """Ends the run and lets go of the snapshots' memory, and of CUDA graphs."""
        self._ring.release()
        self._corrections.start()
        for functions in self._functions:
            for function in functions.values():
                if hasattr(function, "release"):
                    function.release()
        self._clock = None

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self, evaluations: Plan) -> None:
        """Begins a run and forgets the one before.

        Args:
            evaluations: all that will follow, as `haste.sampling.evaluations` lists them; or, if each is a step of its
                own, their times or their number alone.

        Raises:
            UserError: a schedule, an order or a gate that makes no sense for so many steps; see also `Clock`.
        """
        clock = Clock(evaluations)
        plan = clock.plan
        self._num_steps = plan[-1].step + 1 if plan else 0
        self._course: Course = self.schedule.begin(self._num_steps)
        self._check_order()
        self._branches_of_step: dict[int, set[str]] = {}
        for evaluation in plan:
            self._branches_of_step.setdefault(evaluation.step, set()).update(evaluation.branches)
        self._last_position = {evaluation.step: evaluation.position for evaluation in plan}
        self._branches = [b for b in ("label", "null") if any(b in of for of in self._branches_of_step.values())]
        self._clock = clock
        self._ring.clear()
        self._corrections.start()
        self._step: int | None = None
        self._region = self.region_of(0, self._num_steps)
        self.full_steps: list[int] = []
        self.num_full = self.num_forecast = 0

    def _check_order(self) -> None:
        full = self.schedule.full_steps(self._num_steps)
        if full is not None and self.forecaster.order >= max(1, len(full)):
            raise UserError(
                f"--order must be at most {len(full) - 1}, as {len(full)} of {self._num_steps} steps are full, "
                f"got {self.forecaster.order}"
            )

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        """The model's answer, in full or forecast; arguments as for the model.

        Raises:
            UserError: no run has begun, or the call is out of step with its plan, or the batch has no such halves; a
                model that is not what its parts suggest.
            ValueError: the model is in training mode.
        """
        if self.model.training:
            raise ValueError("model is in training mode, where it drops labels at random; call model.eval() first")
        evaluation = self._next_evaluation(t)
        if len(x) % len(evaluation.branches):
            raise UserError(f"x must have as many rows for {' as for '.join(evaluation.branches)}, got {len(x)} rows")
        if isinstance(self.transformer, PublicTransformer):
            self.transformer.verify(x, t, y, gates=self.regions[0].looks_ahead)
        self._make_room(x, evaluation)
        if evaluation.step != self._step or not (self._step_is_full or self._holds(evaluation.branches)):
            self._begin_step(evaluation.step)
        if self._step_is_full:
            output = self._full(x, t, y, evaluation)
            self.num_full += 1
        else:
            output = self._forecast(x, t, y, evaluation)
            self.num_forecast += 1
        self._clock.passed(evaluation)
        return output

    def _next_evaluation(self, t: Tensor) -> ModelCall:
        if self._clock is None:
            raise UserError("no run has begun; call start(number of steps) before the first evaluation")
        evaluation = self._clock.evaluation(t)
        if evaluation is None:
            if self._clock.coming and not self._warned:
                logger.warning("%s", self._clock.cut_short())
                self._warned = True
            self.start(self._clock.given)
            evaluation = self._clock.evaluation(t)
        return evaluation

    def _make_room(self, x: Tensor, evaluation: ModelCall) -> None:
        """Snapshots for every branch of the run, of the type that the region's features have."""
        tokens, dim = self.transformer.tokens_shape
        rows = len(x) // len(evaluation.branches) * len(self._branches)
        dtype = self.transformer.dtype
        if self.regions[0].branch_outputs and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        self._ring.require(rows, tokens, dim, dtype, x.device)

    def _begin_step(self, step: int) -> None:
        """Decides whether a step is full. All its evaluations are alike: Heun's two, and those of both branches."""
        region = self.region_of(step, self._num_steps)
        if region != self._region:
            self._region = region
            self._ring.clear()
        history = self._holds(self._branches_of_step[step])
        self._step = step
        self._step_is_full = self._course.is_full(step, self.full_steps[-1] if history else None)
        if self._step_is_full:
            self._measure = history and self._course.wants_error
            self.full_steps.append(step)

    def _holds(self, branches: Iterable[str]) -> bool:
        """Whether all of these branches have something to be forecast from."""
        return all(self._ring.places(branch) for branch in branches)

    def _full(self, x: Tensor, t: Tensor, y: Tensor, evaluation: ModelCall) -> Any:
        rows = self._rows(evaluation.branches, len(x))
        predicted = None
        # Heun's second evaluation: the first is where the full step before may have looked already.
        last = evaluation.position == self._last_position[evaluation.step]
        if self._measure and last and self._holds(evaluation.branches):
            places = self._ring.places(evaluation.branches[0])
            distance = evaluation.position - places[0].position
            orders = min(len(places), self.forecaster.order + 1)
            predicted = self._forecast(x, t, y, evaluation)  # before the oldest snapshot makes room for the new one
            self._measure = False
        self._corrections.clear()
        slot = self._ring.open(Place(evaluation.position, evaluation.time), evaluation.branches)
        output = self._functions[self._region]["full"](x, t, y, self._ring.storage[:, slot, rows])
        if predicted is not None:
            self._course.report(_relative_error(predicted, output), distance, orders)
        return output

    def _forecast(self, x: Tensor, t: Tensor, y: Tensor, evaluation: ModelCall) -> Any:
        """In one go where all branches have the same history, else branch by branch."""
        place = Place(evaluation.position, evaluation.time)
        weights = [self._weights(branch, place) for branch in evaluation.branches]
        labels = Labels.of(y) if self._clock.times_known and time_of(t) == evaluation.time else None
        if all(other == weights[0] for other in weights):
            return self._forecast_rows(x, t, y, evaluation.branches, evaluation, labels)
        parts = [
            self._forecast_rows(*inputs, (branch,), evaluation, labels)
            for branch, *inputs in zip(evaluation.branches, *(v.chunk(len(weights)) for v in (x, t, y)), strict=True)
        ]
        return _concatenate(parts)

    def _forecast_rows(
        self, x: Tensor, t: Tensor, y: Tensor, branches: Branches, evaluation: ModelCall, labels: Labels | None
    ) -> Any:
        """The rows of branches that have the same history. labels: those of the call; None if the times to come are
        not known."""
        functions, place = self._functions[self._region], Place(evaluation.position, evaluation.time)
        snapshots = self._ring.storage[:, :, self._rows(branches, len(x))]
        if "corrections" not in functions:
            return functions["skipped"](x, t, y, snapshots, self._on_device(self._weights(branches[0], place)))
        correction = self._corrections.get(branches, labels, place) if labels else None
        if correction is None:
            places = self._coming_places(evaluation) if labels and not self._step_is_full else [place]
            made = self._make_corrections(t, y, snapshots, branches, places)
            correction = made[place]
            if len(made) > 1:
                self._corrections.keep(branches, labels, made)
        return functions["corrected"](x, *correction)

    def _make_corrections(
        self, t: Tensor, y: Tensor, snapshots: Tensor, branches: Branches, places: list[Place]
    ) -> dict[Place, Correction]:
        """Those of the evaluations at these places; t (B,) is the time at the first."""
        weights = self._on_device([self._weights(branches[0], place) for place in places])
        if len(places) == 1:
            made = self._functions[self._region]["corrections"](t, y, snapshots, weights)
        else:  # neither compiled nor captured
            times = torch.tensor([[place.time] for place in places], dtype=t.dtype, device=t.device)
            made = self._evaluations[self._region].corrections(times, y, snapshots, weights)
        return {place: Correction(*each) for place, *each in zip(places, *made, strict=True)}

    def _coming_places(self, evaluation: ModelCall) -> list[Place]:
        """Where this evaluation and those like it up to the next full step look, each place once."""
        places: dict[Place, None] = {}
        step = self._step
        for coming in self._clock.coming:
            if coming.step != step:
                step = coming.step
                region = self.region_of(step, self._num_steps)
                if self._course.is_full(step, self.full_steps[-1]) or region != self._region:
                    break
            if coming.branches == evaluation.branches:
                places[Place(coming.position, coming.time)] = None
            if len(places) == MOST_AHEAD:
                break
        return list(places)

    def _rows(self, branches: Sequence[str], count: int) -> slice:
        """Where in the snapshots' rows these branches, of `count` rows together, are."""
        each = count // len(branches)
        first = self._branches.index(branches[0]) * each
        return slice(first, first + count)

    def _weights(self, branch: str, place: Place) -> list[float]:
        coordinate = self.forecaster.coordinate
        places = [getattr(taken, coordinate) for taken in self._ring.places(branch)]
        return self._ring.by_slot(self.forecaster.weights(places, getattr(place, coordinate)), branch)

    def _on_device(self, weights: list[float] | list[list[float]]) -> Tensor:
        return torch.tensor(weights, dtype=torch.float32).to(self._ring.storage.device, non_blocking=True)


@dataclass(frozen=True)
class _Evaluations:
    """The two kinds of evaluation, as functions of tensors alone.

    Methods and no closures: copy.deepcopy of a cached model then makes ones that run the copied model.
    """

    transformer: Transformer
    region: CacheGranularity

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        if self.region.looks_ahead:
            return {"full": self.full, "corrections": self.corrections, "corrected": self.corrected}
        return {"full": self.full, "skipped": self.skipped}

    def full(self, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Any:
        c = self.transformer.conditioning(t, y)
        return self.transformer.output(self.region.full(self.transformer.tokens(x), c, out), c)

    def skipped(self, x: Tensor, t: Tensor, y: Tensor, snapshots: Tensor, weights: Tensor) -> Any:
        c = self.transformer.conditioning(t, y)
        tokens = self.transformer.tokens(x) if self.region.reads_tokens else None
        return self.transformer.output(self.region.skipped(tokens, c, snapshots, weights), c)

    def corrections(self, t: Tensor, y: Tensor, snapshots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of S skipped evaluations at t (S, 1), or one at t (B,): what they add to their tokens (S, B, N, D), and
        their conditioning (S, B, D)."""
        c = self.transformer.conditioning(t, y).view(-1, *y.shape, self.transformer.tokens_shape[1])
        return self.region.corrections(c, snapshots, weights), c

    def corrected(self, x: Tensor, added: Tensor, c: Tensor) -> Any:
        """A skipped evaluation, given what it adds to its tokens."""
        return self.transformer.output(self.transformer.tokens(x).add_(added), c)


def _image(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _relative_error(predicted: Any, computed: Any) -> float:
    """‖predicted − computed‖ / ‖computed‖ over the whole batch."""
    computed = _image(computed).double()
    return ((_image(predicted).double() - computed).norm() / computed.norm().clamp_min(1e-300)).item()


def _concatenate(parts: Sequence[Any]) -> Any:
    """Outputs of parts of a batch as that of the whole."""
    images = torch.cat([_image(part) for part in parts])
    first = parts[0]
    if isinstance(first, Tensor):
        return images
    return type(first)(images, *first[1:]) if hasattr(first, "_fields") else (images, *first[1:])
