"""A cache for images that are made in parts: each part has a run, a schedule and a history of its own.

What is cached is the output, as the head of such a model is not modulated: of each part order + 1 velocities, and a
forecast runs no part of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import haste_ext
from haste.caching.config import CacheConfig
from haste.caching.forecaster import CachedFeatures, Forecaster, Timestep
from haste.caching.report import CacheReport, Stopwatch, mib
from haste.caching.schedule import ScheduleState
from haste.errors import UserError
from haste.samplers import BOTH, COND, UNCOND, Branches, Engine, PartCache, PartCall, evaluate
from haste.samplers.parts import Found, Plan, model_calls_of


class CachedParts(PartCache):
    """A model with a cache, where images are made in parts: its family's `sample` is given this in place of the model.

    The first evaluation of a part is always full, and so is one without features to forecast from, as where guidance
    comes on. In a round of staggered parts all parts up to the last one whose step is full are evaluated, as that one
    depends on them; their velocities are exact then, but kept only for those whose step is full, at even distances. The
    parts behind it are forecast. Heun's two calls are both full or both forecast.

    Args:
        model: of one of haste's families, such as xAR.
        config: the settings of the cache, as `CacheConfig.in_parts` makes them.
        defaults: settings of the config that nobody chose; they shrink to fit the steps of a part.

    Attributes:
        num_full, num_forecast: calls of the model in this run, and of those that it went without.
        full_steps: the rounds so far in which the model was called.

    Raises:
        UserError: contradicting settings, or such as have no meaning in parts.
    """

    def __init__(self, model: nn.Module, config: CacheConfig, defaults: frozenset[str] = frozenset()) -> None:
        super().__init__()
        config.check_cache()
        self.model = model
        self.config = config.in_parts()
        self.defaults = defaults
        self.forecaster = Forecaster.of(self.config)
        self._features: list[CachedFeatures] = []
        self._begin_report()
        self.training = model.training

    # ---- what a caller sees of it ----

    @property
    def cache_bytes(self) -> int:
        """Bytes of the features, 0 before the first round."""
        return sum(features.bytes for features in self._features)

    @property
    def report(self) -> CacheReport:
        """What the cache did in this run, or the last; its steps are rounds, counted through all parts."""
        evaluated, forecast = self._parts_evaluated, self._parts_forecast
        return CacheReport(
            full_steps=list(self.full_steps),
            forecast_steps=list(self._forecast_steps),
            full_calls=self.num_full,
            forecast_calls=self.num_forecast,
            seconds_full=self._watches[0].read(),
            seconds_forecast=self._watches[1].read(),
            mib=mib([self.cache_bytes]),
            cached=f"the velocities of {len(self._features)} parts, of whose {evaluated + forecast} steps {evaluated} "
            "were evaluated",
        )

    def _begin_report(self) -> None:
        self.full_steps: list[int] = []
        self._forecast_steps: list[int] = []
        self.num_full = self.num_forecast = 0
        self._parts_evaluated = self._parts_forecast = 0
        self._watches = Stopwatch(), Stopwatch()  # of rounds that call the model and of the others

    def release(self) -> None:
        """End the run and free the memory of the features."""
        for features in self._features:
            features.release()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise UserError(f"the cache of {type(self.model).__name__} must be used by haste.sample, or by its family's "
                        "sample(cached, noise, condition, solve), got a call")  # fmt: skip

    # ---- a run ----

    def begin_parts(self, plan: Plan) -> None:
        """Begin a run and forget the previous one.

        Args:
            plan: its rounds, as `haste.samplers.plan_parts` lists them.

        Raises:
            UserError: settings out of bounds for the number of steps of a part.
        """
        own = [[call for calls in plan for call in calls if call.part == part and call.branches] for part in
               range(plan[-1][-1].part + 1)]  # fmt: skip
        steps = [calls[-1].step + 1 for calls in own]
        self._schedules = [
            ScheduleState(config, count) for config, count in zip(self._fitted(steps), steps, strict=True)
        ]
        self._branches: list[Branches] = [BOTH if any(UNCOND[0] in call.branches for call in calls) else COND
                                          for calls in own]  # fmt: skip
        if len(self._features) != len(own):
            self._features = [CachedFeatures(1, self.forecaster.order + 1) for _ in own]
        for features in self._features:
            features.clear()
        self._last_full: list[int | None] = [None] * len(own)
        self._forecasting: list[int | None] = [None] * len(own)  # the step that was found to be forecast
        self._round = 0
        self._begin_report()

    def _fitted(self, steps: Sequence[int]) -> list[CacheConfig]:
        """The settings for each part: an order that only a longer part allows shrinks."""
        fitted = [self.config.fitted(count, self.defaults) for count in steps]
        longest = steps.index(max(steps))
        fitted[longest].check_run(steps[longest])
        return [replace(config, order=None) for config in fitted]

    @torch.no_grad()
    def velocities(self, engine: Engine, calls: Sequence[PartCall], states: Sequence[Tensor], separate: bool) -> Found:
        """The velocities of a round by branch, computed or forecast; as of `haste.samplers.evaluate`."""
        if self.model.training:
            raise ValueError("model must be in eval mode, got training mode, which drops labels; call model.eval()")
        full = [number for number, call in enumerate(calls) if call.branches and self._is_full(call)]
        count = full[-1] + 1 if full else 0
        with self._watches[0 if count else 1].running(states[0].device):
            found = evaluate(engine, calls[:count], states[:count], separate) if count else []
            for number in full:
                self._record(calls[number], found[number])
            found += [self._forecast(call) if call.branches else {} for call in calls[count:]]
        self._count(calls, count, separate)
        return found

    def _is_full(self, call: PartCall) -> bool:
        """Decide for a whole step, for Heun's sampler calls twice in it."""
        part, step = call.part, call.step
        if not all(self._features[part].timesteps(branch) for branch in call.branches):
            return True
        if step in (self._last_full[part], self._forecasting[part]):
            return step == self._last_full[part]
        full = self._schedules[part].is_full(step, self._last_full[part])
        if not full:
            self._forecasting[part] = step
        return full

    def _record(self, call: PartCall, velocities: dict[str, Tensor]) -> None:
        """Keep what was computed of the branches that the part will need."""
        features, own = self._features[call.part], self._branches[call.part]
        first = next(iter(velocities.values()))
        batch = len(first)
        _, tokens, dim = first.shape
        features.reserve(batch * len(own), tokens, dim, first.dtype, first.device)
        present = [branch for branch in own if branch in velocities]
        slot = features.slot_for(_timestep(call), present)
        for branch in present:
            features.storage[0, slot, _rows(own, branch, batch)] = velocities[branch]
        self._last_full[call.part] = call.step

    def _forecast(self, call: PartCall) -> dict[str, Tensor]:
        """All rows at once where the branches have the same history, else branch by branch."""
        features, own = self._features[call.part], self._branches[call.part]
        stored, batch = features.storage[0], features.storage.shape[2] // len(own)
        weights = [features.by_slot(self.forecaster.weights(features.timesteps(branch), _timestep(call)), branch) for
                   branch in call.branches]  # fmt: skip
        if len(weights) == 2 and weights[0] == weights[1]:
            made = _extrapolate(stored, weights[0])
            return dict(zip(call.branches, made.tensor_split(2), strict=True))
        return {
            branch: _extrapolate(stored[:, _rows(own, branch, batch)], of_branch)
            for branch, of_branch in zip(call.branches, weights, strict=True)
        }

    def _count(self, calls: Sequence[PartCall], evaluated: int, separate: bool) -> None:
        if evaluated:
            self.full_steps.append(self._round)
            self.num_full += len(model_calls_of(calls[:evaluated], separate))
        else:
            self._forecast_steps.append(self._round)
            self.num_forecast += len(model_calls_of(calls, separate))
        self._round += 1
        self._parts_evaluated += sum(1 for call in calls[:evaluated] if call.branches)
        self._parts_forecast += sum(1 for call in calls[evaluated:] if call.branches)


def _timestep(call: PartCall) -> Timestep:
    return Timestep(call.position, call.time)


def _rows(own: Branches, branch: str, batch: int) -> slice:
    first = own.index(branch) * batch
    return slice(first, first + batch)


def _extrapolate(stored: Tensor, weights: Sequence[float]) -> Tensor:
    """(slots, rows, n, d) and one weight per slot: (rows, n, d)."""
    on_device = torch.tensor(weights, dtype=torch.float32).to(stored.device, non_blocking=True)
    return haste_ext.taylor_extrapolate(stored, on_device)
