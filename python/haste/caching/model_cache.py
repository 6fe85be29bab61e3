"""The cache of one model that is called with any arguments: which of its calls are computed in full, and the others'
forecasts.

A clock (clocks.py) places each call in a run: its step, its time, and the guidance branch that it computes. What the
call was made with, its signature, tells whether it continues the branch: tensors of another size have no history.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from haste._compat import is_compiled
from haste.caching.config import LEAST_STEPS, CacheConfig
from haste.caching.discovery import Discovery, Run, find_parts, floats
from haste.caching.forecaster import CachedFeatures, Forecaster, Timestep
from haste.caching.memory import check_fits
from haste.caching.report import CacheReport, Stopwatch, mib
from haste.caching.schedule import ScheduleState
from haste.caching.seams import Output, Seam, make_seams
from haste.errors import UserError

MOST_SIGNATURES = 64  # of which the seams are remembered; a seam holds no features


class Moment(NamedTuple):
    """The place of a model call in a run.

    position: the number of its time among the times of the run; two calls of Heun's method may share one.
    branch: names the guidance branch, whose calls continue each other.
    """

    step: int
    position: float
    time: float
    branch: Hashable


@dataclass
class Branch:
    """The calls of a run that continue each other."""

    signature: Hashable
    seams: list[Seam] = field(default_factory=list)
    features: list[CachedFeatures] = field(default_factory=list)
    last_full: int = -1

    def clear(self) -> None:
        for each in self.features:
            each.clear()

    @property
    def taken(self) -> list[Timestep]:
        """Of which calls features are held, newest first."""
        return self.features[0].timesteps("") if self.features else []


class ModelCache:
    """A cache for the calls of one model.

    Args:
        model: any module. It is changed only for the length of a call.
        config: the settings; `defaults` are those that nobody chose, which shrink to fit a short run.

    Raises:
        UserError: contradicting settings, or a schedule by measured errors in several processes.
    """

    def __init__(self, model: nn.Module, config: CacheConfig, defaults: frozenset[str] = frozenset()) -> None:
        config.check_cache()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if config.error_threshold and several and torch.distributed.get_world_size() > 1:
            raise UserError(f"error_threshold must be 0 in several processes, whose schedules would differ, got "
                            f"{config.error_threshold:g}; choose interval= or full_steps=")  # fmt: skip
        self.model = model
        self.config = config
        self.defaults = defaults
        self._seams: OrderedDict[Hashable, list[Seam]] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._lock = threading.RLock()
        self.begin(0)

    # ---- a run ----

    def begin(self, num_steps: int, noisy: bool = False) -> None:
        """Begin a run and forget the previous one.

        Args:
            noisy: the solver adds noise at every step; a high order would multiply it.

        Raises:
            UserError: settings that do not fit a run of this many steps.
        """
        self._last_report: CacheReport | None = None
        self._num_steps = num_steps
        self._branches: dict[Hashable, Branch] = {}
        self._step: int | None = None
        self._first_step = 0
        self._last_full: int | None = None
        self._group = 0
        self._full_calls = self._forecast_calls = 0
        self._full_steps: dict[int, None] = {}
        self._forecast_steps: dict[int, None] = {}
        self._watches = Stopwatch(), Stopwatch()
        if not num_steps:
            return
        config = self.config
        if {"interval", "order"} <= self.defaults and num_steps < LEAST_STEPS:
            raise UserError(f"num_steps must be at least {LEAST_STEPS} for the default settings of a cache, got "
                            f"{num_steps}; go without a cache, or choose interval= or full_steps=")  # fmt: skip
        config = config.fitted(num_steps, self.defaults)
        if noisy and config.resolved_order > 1:
            if "order" not in self.defaults:
                raise UserError("order must be at most 1 with a scheduler that adds noise at every step, which a "
                                f"higher order multiplies, got {config.resolved_order}")  # fmt: skip
            config = replace(config, order=1)
        self._schedule = ScheduleState(config, num_steps)
        self._forecaster = Forecaster.of(config)

    def release(self) -> None:
        """End the run, and free the features and all that was found out about the model; the report stays."""
        report = self.report
        self.begin(0)
        self._seams.clear()
        self._modules = []
        self._last_report = report

    @property
    def report(self) -> CacheReport:
        """Of the run so far, or the last."""
        if self._last_report is not None:
            return self._last_report
        sizes = [each.bytes for branch in self._branches.values() for each in branch.features]
        cached = [seam.description for branch in self._branches.values() for seam in branch.seams[:1]]
        return CacheReport(
            list(self._full_steps),
            [step for step in self._forecast_steps if step not in self._full_steps],
            self._full_calls,
            self._forecast_calls,
            self._watches[0].read(),
            self._watches[1].read(),
            mib(sizes),
            "; ".join(dict.fromkeys(cached)),
        )

    # ---- a call ----

    @torch.no_grad()
    def call(self, run: Run, eager: Run, args: tuple, kwargs: dict, moment: Moment, signature: Hashable) -> Any:
        """The model's answer, computed in full or forecast.

        Args:
            run: calls the model as its user would; `eager` without a compilation of the whole model.
            signature: what the call was made with (`clocks.signature`).

        Raises:
            UserError: the model is in training mode, or cannot be cached at this granularity.
        """
        if self.model.training:
            raise UserError(f"the model must be in eval mode to be cached, got {type(self.model).__name__} in training "
                            "mode; call its eval()")  # fmt: skip
        with self._lock:
            branch = self._branch_of(signature, moment)
            if moment.step != self._step:
                self._begin_step(moment, branch)
            if self._step_is_full or not branch.taken:
                return self._full(run, eager, args, kwargs, moment, branch)
            self._forecast_calls += 1
            self._forecast_steps.setdefault(moment.step)
            with self._watches[1].running(self._device(branch)):
                return self._forecast(eager, args, kwargs, moment, branch)

    def _branch_of(self, of: Hashable, moment: Moment) -> Branch:
        branch = self._branches.get(moment.branch)
        if branch is None or branch.signature != of:
            branch = self._branches[moment.branch] = Branch(of)
        elif self._last_full is not None and branch.last_full < self._last_full != moment.step:
            branch.clear()  # it sat out a full step, and what it holds is from long ago
        return branch

    def _begin_step(self, moment: Moment, branch: Branch) -> None:
        """Decide whether a step is full, for all branches that can be forecast."""
        if self._step is None:
            self._first_step = moment.step  # of Wan 2.2's second model not 0
        self._step = moment.step
        since = 0 if self._schedule.listed else self._first_step  # what is counted from the model's own first step
        gate = self.config.resolved_gate(self._num_steps)
        group = int(self.config.cache == "delta-dit" and self._num_steps - moment.step <= gate)
        if group != self._group:
            self._group = group
            for other in self._branches.values():
                other.features = []  # the groups return tensors of different shapes
        last = self._last_full if branch.taken else None
        self._step_is_full = self._schedule.is_full(moment.step - since, None if last is None else last - since)
        self._measure = self._step_is_full and self._schedule.wants_error and bool(branch.taken)
        if self._step_is_full:
            self._last_full = moment.step

    def _full(self, run: Run, eager: Run, args: tuple, kwargs: dict, moment: Moment, branch: Branch) -> Any:
        self._full_calls += 1
        self._full_steps.setdefault(moment.step)
        at = Timestep(moment.position, moment.time)
        predicted = None
        if self._measure and branch.taken and branch.taken[0].position != at.position:
            distance, count = at.position - branch.taken[0].position, len(branch.taken)
            predicted = floats(self._forecast(eager, args, kwargs, moment, branch))
            self._measure = False
        device = _device_of(args, kwargs)
        with self._watches[0].running(device):
            answer = None
            if not branch.seams:
                answer = self._find_seams(run, eager, args, kwargs, branch)
            seam = branch.seams[self._group]
            if not branch.features:
                discover = partial(Discovery, self.model, eager, args, kwargs)
                branch.features = self._reserve(seam, discover)
            outs = [each.storage[:, each.slot_for(at, ("",))] for each in branch.features]
            if answer is not None and seam.initial is not None:
                for out, value in zip(outs, seam.initial, strict=True):
                    out.view(value.shape).copy_(value)
            else:
                answer = seam.full(run, args, kwargs, outs)
        for each in branch.seams:
            each.initial = None
        branch.last_full = moment.step
        if predicted is not None:
            self._schedule.report(_relative_error(predicted, floats(answer)), distance, count)
        return answer

    def _find_seams(self, run: Run, eager: Run, args: tuple, kwargs: dict, branch: Branch) -> Any:
        """Give the branch its seams. Returns the answer to this call if they were found from it."""
        modules = [place.module for places in find_parts(self.model) for place in places]
        if len(modules) != len(self._modules) or any(map(operator.is_not, modules, self._modules)):
            self._seams.clear()  # some were replaced, and seams are of those that were there
            self._modules = modules
        answer = None
        seams = self._seams.get(branch.signature)
        if seams is None and self.config.granularity == "output" and self.config.cache != "delta-dit":
            answer = run(args, kwargs)
            seams = [Output(answer)]
        elif seams is None:
            discovery = Discovery(self.model, eager, args, kwargs)
            seams = make_seams(self.config, discovery)
            answer = None if is_compiled(self.model) else discovery.answer
            discovery.forget()
        self._seams[branch.signature] = seams
        self._seams.move_to_end(branch.signature)
        while len(self._seams) > MOST_SIGNATURES:
            self._seams.popitem(last=False)
        branch.seams = seams
        return answer

    def _reserve(self, seam: Seam, discover: Callable[[], Discovery]) -> list[CachedFeatures]:
        slots = self._forecaster.order + 1
        specs = seam.stores()
        check_fits(self.model, self.config, slots, specs, discover)
        features = []
        for spec in specs:
            features.append(CachedFeatures(spec.modules, slots))
            features[-1].reserve(spec.rows, spec.tokens, spec.dim, spec.dtype, spec.device)
        return features

    def _forecast(self, eager: Run, args: tuple, kwargs: dict, moment: Moment, branch: Branch) -> Any:
        weights = self._forecaster.weights(branch.taken, Timestep(moment.position, moment.time))
        by_slot = branch.features[0].by_slot(weights, "")
        on_device = torch.tensor(by_slot, dtype=torch.float32).to(self._device(branch), non_blocking=True)
        return branch.seams[self._group].forecast(
            eager, args, kwargs, [each.storage for each in branch.features], on_device
        )

    def _device(self, branch: Branch) -> torch.device:
        return branch.features[0].storage.device


def _device_of(args: tuple, kwargs: dict) -> torch.device:
    return next((tensor.device for tensor in floats((args, kwargs))), torch.device("cpu"))


def _relative_error(predicted: Sequence[Tensor], computed: Sequence[Tensor]) -> float:
    """‖predicted − computed‖ / ‖computed‖ over all tensors."""
    error = sum(float((p.double() - c.double()).square().sum()) for p, c in zip(predicted, computed, strict=True))
    norm = sum(float(c.double().square().sum()) for c in computed)
    return (error / max(norm, 1e-300)) ** 0.5
