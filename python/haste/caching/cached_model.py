"""A cached model: in a sampling run most of its calls are forecast from the last full ones.

A schedule decides which steps are full, a forecaster how the others are predicted, a granularity what of the model is
predicted. The model itself is not changed.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haste.caching.adapters import find_transformer, make_granularities
from haste.caching.config import CacheConfig
from haste.caching.forecaster import CachedFeatures, Correction, Corrections, Forecaster, Timestep
from haste.caching.report import CacheReport, Stopwatch, mib
from haste.caching.schedule import Clock, Plan, ScheduleState
from haste.errors import UserError
from haste.samplers import BOTH, Branches, ModelCall, time_of, times_at

logger = logging.getLogger(__name__)

MOST_AHEAD = 8  # calls: what one pass makes on a GPU; it bounds the memory too
MOST_COMPILATIONS = 1000


class CachedModel(nn.Module):
    """A model with a cache, for sampling: called like the model, it returns what the model returns.

    Every run begins with `start`, which `haste.samplers.sample` calls. The time of a call identifies it in the run (see
    `Clock`). Without features to forecast from (another batch, or guidance that comes on and whose uncond half has no
    history) a step is full whatever the schedule.

    Args:
        model: of one of haste's families.
        config: the settings of the cache.
        defaults: settings of the config that nobody chose; they shrink to fit a short run.

    Attributes:
        num_full, num_forecast: calls so far in this run.
        full_steps: the steps so far that were full.

    Raises:
        UserError: contradicting settings, or a model that has no adapter.
    """

    def __init__(self, model: nn.Module, config: CacheConfig, defaults: frozenset[str] = frozenset()) -> None:
        super().__init__()
        config.check_cache()
        self.model = model
        self.config = config
        self.transformer = find_transformer(model, config)
        self.granularities = make_granularities(self.transformer, config)
        self.forecaster = Forecaster.of(config)
        self._features = CachedFeatures(self.granularities[0].modules, self.forecaster.order + 1)
        self._corrections = Corrections()
        self._functions = [granularity.functions for granularity in self.granularities]
        self._clock: Clock | None = None
        self.defaults = defaults
        self._begin_report()
        self._warned = False  # of a run that ended before its plan
        self.training = model.training  # and every part of the model stays in its own mode

    # ---- what a caller sees of the model ----

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of the features, 0 before the first call, and the most that corrections took in this run."""
        return self._features.bytes + self._corrections.most_bytes

    @property
    def report(self) -> CacheReport:
        """What the cache did in this run, or the last."""
        return CacheReport(
            full_steps=list(dict.fromkeys(self.full_steps)),
            forecast_steps=[step for step in self._forecast_steps if step not in self.full_steps],
            full_calls=self.num_full,
            forecast_calls=self.num_forecast,
            seconds_full=self._watches[0].read(),
            seconds_forecast=self._watches[1].read(),
            mib=mib([self.cache_bytes]),
            cached="; ".join(dict.fromkeys(granularity.description for granularity in self.granularities)),
        )

    def _begin_report(self) -> None:
        self.full_steps: list[int] = []
        self._forecast_steps: dict[int, None] = {}
        self.num_full = self.num_forecast = 0
        self._watches = Stopwatch(), Stopwatch()  # of full and of forecast calls

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
        """Compile both kinds of call, each without a graph break.

        The first batch size has kernels of its own; from the second on they serve any size. Corrections for several
        calls at once are not compiled: they are one kernel, and each number of calls would be another compilation.

        Args:
            options: of torch.compile.
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
        """Capture both kinds of call in CUDA graphs when they are first made, and replay these from then on. As with
        `compile`, not the corrections for several calls at once.

        Raises:
            UserError: the model is on no GPU.
        """
        from haste.caching.cuda_graphs import GRAPHED

        device = next(self.model.parameters()).device
        if device.type != "cuda":
            raise UserError(f"the model must be on a GPU for CUDA graphs, got {device}")
        self._functions = [
            {name: GRAPHED[name](function) for name, function in functions.items()} for functions in self._functions
        ]
        return self

    def release(self) -> None:
        """End the run and free the memory of the features, and of CUDA graphs."""
        self._features.release()
        self._corrections.start()
        for functions in self._functions:
            for function in functions.values():
                if hasattr(function, "release"):
                    function.release()
        self._clock = None

    # ---- a run ----

    def start(self, plan: Plan) -> None:
        """Begin a run and forget the previous one.

        Args:
            plan: all calls that will follow, as `haste.samplers.model_calls` lists them; or, with one call per step,
                their times or their number.

        Raises:
            UserError: settings out of bounds for this number of steps; see also `Clock`.
        """
        clock = Clock(plan)
        calls = clock.plan
        self._num_steps = calls[-1].step + 1 if calls else 0
        self._schedule = ScheduleState(self.config.fitted(self._num_steps, self.defaults), self._num_steps)
        self._branches_of_step: dict[int, set[str]] = {}
        for call in calls:
            self._branches_of_step.setdefault(call.step, set()).update(call.branches)
        self._last_position = {call.step: call.position for call in calls}
        self._branches = [b for b in BOTH if any(b in of for of in self._branches_of_step.values())]
        self._clock = clock
        self._features.clear()
        self._corrections.start()
        self._step: int | None = None
        self._granularity = self._granularity_of(0)
        self._begin_report()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Any:
        """The model's output, computed in full or forecast.

        Args:
            x, t, y: as the model takes them; t holds one time for the whole batch, or is that number.

        Raises:
            UserError: no run has begun, the call is not the next of the plan, the batch has no cond and uncond halves,
            ValueError: the model is in training mode.
        """
        if self.model.training:
            raise ValueError("model must be in eval mode, got training mode, which drops labels; call model.eval()")
        if not isinstance(t, Tensor):
            t = times_at(float(t), len(x), torch.promote_types(self.dtype, torch.float32), x.device)
        call = self._next_call(t)
        if len(x) % len(call.branches):
            raise UserError(f"x must have as many rows for {' as for '.join(call.branches)}, got {len(x)} rows")
        self._reserve(x, y, call)
        if call.step != self._step or not (self._step_is_full or self._holds(call.branches)):
            self._begin_step(call.step)
        with self._watches[0 if self._step_is_full else 1].running(x.device):
            output = (self._full if self._step_is_full else self._forecast)(x, t, y, call)
        if self._step_is_full:
            self.num_full += 1
        else:
            self.num_forecast += 1
            self._forecast_steps[call.step] = None
        self._running.count(call)
        return output

    @property
    def _running(self) -> Clock:
        if self._clock is None:
            raise UserError("no run has begun; call start(number of steps) before the first call")
        return self._clock

    def _next_call(self, t: Tensor) -> ModelCall:
        clock = self._running
        call = clock.next_call(t)
        if call is None:
            if clock.coming and not self._warned:
                logger.warning("%s", clock.cut_short())
                self._warned = True
            self.start(clock.given)
            return self._next_call(t)
        return call

    def _reserve(self, x: Tensor, y: Tensor, call: ModelCall) -> None:
        """Reserve memory for the features of every branch of the run, as they are at the step of this call."""
        granularity = self.granularities[self._granularity_of(call.step)]
        tokens, dim = granularity.features_shape(x.shape[1:], y)
        rows = len(x) // len(call.branches) * len(self._branches)
        dtype = self.transformer.dtype
        if self.granularities[0].branch_outputs and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        self._features.reserve(rows, tokens, dim, dtype, x.device)

    def _begin_step(self, step: int) -> None:
        """Decide whether a step is full, for all of its calls: Heun's two, and cond and uncond."""
        granularity = self._granularity_of(step)
        if granularity != self._granularity:
            self._granularity = granularity
            self._features.clear()
        history = self._holds(self._branches_of_step[step])
        self._step = step
        self._step_is_full = self._schedule.is_full(step, self.full_steps[-1] if history else None)
        if self._step_is_full:
            self._measure = history and self._schedule.wants_error
            self.full_steps.append(step)

    def _granularity_of(self, step: int) -> int:
        """The index of the granularity; of Δ-DiT's two the rear blocks while more than `gate` steps remain."""
        gate = self.config.resolved_gate(self._num_steps)
        return int(len(self.granularities) == 2 and self._num_steps - step <= gate)

    def _holds(self, branches: Iterable[str]) -> bool:
        """Whether all of these branches have something to be forecast from."""
        return all(self._features.timesteps(branch) for branch in branches)

    def _full(self, x: Tensor, t: Tensor, y: Tensor, call: ModelCall) -> Any:
        rows = self._rows(call.branches, len(x))
        predicted = None
        # Measured at Heun's second call, as the full step before may have been at the time of the first.
        last = call.position == self._last_position[call.step]
        if self._measure and last and self._holds(call.branches):
            taken = self._features.timesteps(call.branches[0])
            distance = call.position - taken[0].position
            count = min(len(taken), self.forecaster.order + 1)
            predicted = self._forecast(x, t, y, call)  # before the oldest features make room for the new ones
            self._measure = False
        self._corrections.clear()
        slot = self._features.slot_for(_timestep(call), call.branches)
        output = self._functions[self._granularity]["full"](x, t, y, self._features.storage[:, slot, rows])
        if predicted is not None:
            self._schedule.report(_relative_error(predicted, output, x.shape[1]), distance, count)
        return output

    def _forecast(self, x: Tensor, t: Tensor, y: Tensor, call: ModelCall) -> Any:
        """Forecast all rows at once where the branches have the same history, else branch by branch."""
        weights = [self._weights(branch, _timestep(call)) for branch in call.branches]
        labels = y if self._running.times_known and time_of(t) == call.time else None
        if all(other == weights[0] for other in weights):
            return self._forecast_rows(x, t, y, call.branches, call, labels)
        parts = [
            self._forecast_rows(x_half, t_half, y_half, (branch,), call, labels)
            for branch, x_half, t_half, y_half in zip(
                call.branches, *(v.chunk(len(weights)) for v in (x, t, y)), strict=True
            )
        ]
        return _concatenate(parts)

    def _forecast_rows(
        self, x: Tensor, t: Tensor, y: Tensor, branches: Branches, call: ModelCall, labels: Tensor | None
    ) -> Any:
        """Forecast the rows of branches that have the same history. labels: of the whole call; None if the times of
        later calls are not known."""
        functions, timestep = self._functions[self._granularity], _timestep(call)
        features = self._features.storage[:, :, self._rows(branches, len(x))]
        if "corrections" not in functions:
            return functions["forecast"](x, t, y, features, self._on_device(self._weights(branches[0], timestep)))
        correction = None if labels is None else self._corrections.get(branches, labels, timestep)
        if correction is None:
            ahead = labels is not None and not self._step_is_full
            timesteps = self._coming_timesteps(call) if ahead else [timestep]
            made = self._make_corrections(t, y, features, branches, timesteps)
            correction = made[timestep]
            if len(made) > 1:
                self._corrections.keep(branches, labels, made)
        return functions["corrected"](x, *correction)

    def _make_corrections(
        self, t: Tensor, y: Tensor, features: Tensor, branches: Branches, timesteps: list[Timestep]
    ) -> dict[Timestep, Correction]:
        """The corrections of the calls at these timesteps; t (B,) is the time of the first."""
        weights = self._on_device([self._weights(branches[0], timestep) for timestep in timesteps])
        if len(timesteps) == 1:
            made = self._functions[self._granularity]["corrections"](t, y, features, weights)
        else:  # neither compiled nor captured
            times = torch.tensor([[timestep.time] for timestep in timesteps], dtype=t.dtype, device=t.device)
            made = self.granularities[self._granularity].functions["corrections"](times, y, features, weights)
        return dict(zip(timesteps, zip(*made, strict=True), strict=True))

    def _coming_timesteps(self, call: ModelCall) -> list[Timestep]:
        """The timesteps of this call and of those of the same branches up to the next full step, each once."""
        timesteps: dict[Timestep, None] = {}
        step = self._step
        for coming in self._running.coming:
            if coming.step != step:
                step = coming.step
                if self._schedule.is_full(step, self.full_steps[-1]) or self._granularity_of(step) != self._granularity:
                    break
            if coming.branches == call.branches:
                timesteps[_timestep(coming)] = None
            if len(timesteps) == MOST_AHEAD:
                break
        return list(timesteps)

    def _rows(self, branches: Sequence[str], count: int) -> slice:
        """The rows of the features that hold these branches, of `count` rows together."""
        each = count // len(branches)
        first = self._branches.index(branches[0]) * each
        return slice(first, first + count)

    def _weights(self, branch: str, timestep: Timestep) -> list[float]:
        taken = self._features.timesteps(branch)
        return self._features.by_slot(self.forecaster.weights(taken, timestep), branch)

    def _on_device(self, weights: list[float] | list[list[float]]) -> Tensor:
        return torch.tensor(weights, dtype=torch.float32).to(self._features.storage.device, non_blocking=True)


def _timestep(call: ModelCall) -> Timestep:
    return Timestep(call.position, call.time)


def _image(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _relative_error(predicted: Any, computed: Any, channels: int) -> float:
    """‖predicted − computed‖ / ‖computed‖ over the whole batch, of the first channels: behind noise is its variance."""
    predicted, computed = (_image(output)[:, :channels].double() for output in (predicted, computed))
    return ((predicted - computed).norm() / computed.norm().clamp_min(1e-300)).item()


def _concatenate(parts: Sequence[Any]) -> Any:
    """Outputs of parts of a batch as that of the whole."""
    images = torch.cat([_image(part) for part in parts])
    first = parts[0]
    if isinstance(first, Tensor):
        return images
    return type(first)(images, *first[1:]) if hasattr(first, "_fields") else (images, *first[1:])
