"""The places of model calls in a run: from times, and from a scheduler."""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from haste.caching.clocks import (
    Arguments,
    BranchNames,
    LoopClock,
    SchedulerClock,
    is_noisy,
    signature,
    unwatch,
    watch,
)
from haste.errors import UserError
from haste.samplers import Guidance, model_calls
from torch import nn


class Model(nn.Module):
    def forward(self, hidden_states, timestep=None, text=None, **kwargs):
        return hidden_states


ARGUMENTS = Arguments(Model())
COND, UNCOND = torch.zeros(1, 2), torch.ones(1, 2)


# ---- arguments ----


def test_arguments_have_their_names_however_they_are_given():
    x, t = torch.ones(1, 3), torch.tensor([5.0])
    by_position = ARGUMENTS.named((x, t), {"scale": 2, "text": None})
    assert by_position == ARGUMENTS.named((), {"hidden_states": x, "timestep": t, "scale": 2})
    assert list(by_position) == ["hidden_states", "timestep", "scale"]


@pytest.mark.parametrize("time", [torch.tensor([7.0, 7.0]), torch.tensor(7), 7, 7.0])
def test_times_are_read(time):
    assert ARGUMENTS.time({"timestep": time}) == 7.0


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"hidden_states": COND}, "the model must be called with a time"),
        ({"timestep": torch.tensor([1.0, 2.0])}, "timestep must be one time for the whole batch"),
        ({"timestep": torch.tensor([])}, "timestep must be finite"),
        ({"timestep": float("nan")}, "timestep must be finite"),
    ],
)
def test_calls_without_one_time_are_refused(named, match):
    with pytest.raises(UserError, match=match):
        ARGUMENTS.time(named)


def test_a_signature_is_of_shapes_types_and_small_values_but_not_of_the_time():
    base = {"x": torch.ones(2, 3), "timestep": 5, "extra": {"scale": 1.0, "parts": [torch.ones(1)]}}
    same = {"x": torch.zeros(2, 3), "timestep": 6, "extra": {"scale": 1.0, "parts": [torch.zeros(1)]}}
    assert signature(base) == signature(same)
    others = [{"x": torch.ones(3, 3)}, {"x": torch.ones(2, 3).half()}, {"extra": {"scale": 0.5}}, {"skip_layers": [1]}]
    assert all(signature({**base, **other}) != signature(base) for other in others)
    hash(signature(base))


# ---- branches ----


def test_branches_are_told_apart_by_their_conditions_then_by_their_order():
    names = BranchNames()
    x = torch.ones(1, 3)
    calls = {"a": {"x": x, "text": COND}, "b": {"x": x, "text": UNCOND}}

    def step(*which: str) -> list:
        names.next_step()
        return [names.name(calls[each], None, again=False) for each in which]

    a, b = step("a", "b")
    assert a != b and step("a", "b") == [a, b]
    assert step("b") == [b]  # guidance is off, and the condition was the second
    assert step("b", "a") == [b, a]
    calls["b"] = {"x": x, "text": UNCOND.clone()}  # made anew in each step: by order
    assert step("a", "b") == [a, b]


def test_names_of_contexts_are_branches():
    names = BranchNames()
    assert [names.name({}, name, again=False) for name in ("cond", "uncond")] == ["cond", "uncond"]


# ---- a loop of one's own ----


def moments(clock: LoopClock, calls) -> list[tuple[int, float, object]]:
    """(step, time, branch) of calls at (time, condition)."""
    made = []
    for time, text in calls:
        made.append(clock.moment(lambda time=time: time, {"x": torch.ones(1), "text": text}, None))
    return [(moment.step, moment.time, moment.branch) for moment in made]


@pytest.mark.parametrize("plan", [3, [900.0, 600.0, 300.0]])
def test_calls_at_one_time_are_the_branches_of_a_step(plan):
    begun = []
    clock = LoopClock(plan, begun.append)
    calls = [(time, text) for time in (900.0, 600.0, 300.0) for text in (COND, UNCOND)]
    expected = [(step, time, branch) for step, time in enumerate((900.0, 600.0, 300.0)) for branch in (0, 1)]
    assert moments(clock, calls) == expected
    assert moments(clock, calls) == expected and begun == [3, 3]  # the first time again begins a run


def test_of_heuns_calls_the_second_is_another_of_its_branch():
    clock = LoopClock(3, lambda num_steps: None)
    calls = [(time, COND) for time in (3.0, 2.0, 2.0, 1.0, 1.0)]
    assert [(step, branch) for step, _, branch in moments(clock, calls)] == [(0, 0), (1, 0), (1, 0), (2, 0), (2, 0)]


def test_a_run_that_was_broken_off_is_followed_by_a_new_one():
    clock = LoopClock(4, lambda num_steps: None)
    assert [step for step, *_ in moments(clock, [(t, COND) for t in (4.0, 3.0, 2.0, 4.0, 3.0)])] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("plan", "times", "match"),
    [
        (2, (3.0, 2.0, 1.0), "num_steps must be"),
        ([3.0, 2.0, 1.0], (3.0, 1.0), "times must be those that the model is called at"),
        (4, (4.0, 3.0, 3.5), "timestep must fall, or rise"),
        (0, (), "num_steps must be"),
        ([1.0, 1.0], (), "times must fall"),
    ],
)
def test_calls_that_are_not_in_the_plan_are_refused(plan, times, match):
    with pytest.raises(UserError, match=match):
        moments(LoopClock(plan, lambda num_steps: None), [(time, COND) for time in times])


def test_times_may_be_rounded_as_the_model_is():
    times = [float(t) for t in torch.linspace(1, 0.02, 50, dtype=torch.float64)]
    clock = LoopClock(times, lambda num_steps: None)
    rounded = [float(torch.tensor(t, dtype=torch.bfloat16)) for t in times]
    assert [step for step, *_ in moments(clock, [(t, COND) for t in rounded])] == list(range(50))


def test_all_calls_of_a_run_may_be_listed():
    calls = model_calls("heun", 3, Guidance(2.0, mode="separate"))
    clock = LoopClock(calls, lambda num_steps: None)
    made = moments(clock, [(call.time, COND) for call in calls])
    assert made == [(call.step, call.time, call.branches) for call in calls]


# ---- a scheduler ----


class Scheduler:
    def __init__(self) -> None:
        self.timesteps = None
        self.config = {}

    def set_timesteps(self, num_inference_steps=None, timesteps=None):
        self.timesteps = torch.tensor(timesteps or range(num_inference_steps, 0, -1))

    def step(self, model_output, timestep, sample):
        return (sample,)


def follow(scheduler, clock, count: int, first: int = 0) -> list[tuple[int, float]]:
    """(step, time) of one model call per evaluation."""
    made = []
    for t in scheduler.timesteps[first : first + count]:
        _, _, step, time = clock.moment(scheduler)
        made.append((step, time))
        scheduler.step(None, t, None)
    return made


def test_a_scheduler_begins_runs_and_ends_evaluations():
    scheduler = Scheduler()
    clock = SchedulerClock.of(scheduler)
    scheduler.set_timesteps(3)
    first = clock.moment(scheduler)[0]
    assert follow(scheduler, clock, 3) == [(0, 3.0), (1, 2.0), (2, 1.0)] and clock.num_steps == 3
    scheduler.set_timesteps(timesteps=[3, 2, 2, 1, 1])  # Heun's method
    assert clock.moment(scheduler)[0] != first
    assert follow(scheduler, clock, 5) == [(0, 3.0), (1, 2.0), (1, 2.0), (2, 1.0), (2, 1.0)] and clock.num_steps == 3


def test_a_call_after_the_last_step_is_in_no_run():
    scheduler = Scheduler()
    clock = SchedulerClock.of(scheduler)
    scheduler.set_timesteps(3)
    follow(scheduler, clock, 3)
    assert clock.moment(scheduler) is None


@pytest.mark.parametrize("told", [True, False])
def test_a_run_may_begin_later(told):
    scheduler = Scheduler()
    clock = SchedulerClock.of(scheduler)
    scheduler.set_timesteps(6)
    scheduler.begin_index = 2 if told else None
    made = follow(scheduler, clock, 4, first=2)
    assert made[1:] == [(1, 3.0), (2, 2.0), (3, 1.0)] and clock.num_steps == 4


def test_copies_of_a_scheduler_do_not_move_its_clock():
    scheduler = Scheduler()
    clock = SchedulerClock.of(scheduler)
    scheduler.set_timesteps(3)
    other = copy.deepcopy(scheduler)
    before = clock.moment(scheduler)
    other.set_timesteps(5)
    assert clock.moment(scheduler) == before and len(other.timesteps) == 5
    other.step(None, other.timesteps[0], None)
    with pytest.raises(UserError, match="the pipeline must step its scheduler"):
        clock.moment(scheduler)


def test_a_scheduler_has_its_class_back_after_its_last_user():
    scheduler = Scheduler()
    clocks = [SchedulerClock.of(scheduler) for _ in range(2)]
    assert clocks[0] is clocks[1] and type(scheduler) is not Scheduler and isinstance(scheduler, Scheduler)
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(Scheduler().set_timesteps)
    clocks[0].leave(scheduler)
    assert type(scheduler) is not Scheduler
    clocks[1].leave(scheduler)
    assert type(scheduler) is Scheduler and not vars(scheduler).keys() - vars(Scheduler()).keys()


def test_a_scheduler_without_timesteps_is_refused():
    scheduler = Scheduler()
    with pytest.raises(UserError, match="the pipeline must set the timesteps"):
        SchedulerClock.of(scheduler).moment(scheduler)


def test_a_clock_does_not_keep_its_scheduler():
    clock = SchedulerClock.of(Scheduler())
    gc.collect()
    assert clock not in SchedulerClock._clocks.values()


@pytest.mark.parametrize(
    ("name", "config", "noisy"),
    [
        ("LCMScheduler", {}, True),
        ("EulerAncestralDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, False),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, True),
        ("FlowMatchEulerDiscreteScheduler", {}, False),
    ],
)
def test_schedulers_that_add_noise_are_known(name, config, noisy):
    scheduler = type(name, (Scheduler,), {})()
    scheduler.config = config
    assert is_noisy(scheduler) is noisy


def test_watching_goes_around_methods_of_one_instance():
    one, other = Scheduler(), Scheduler()
    seen = []
    watch(one, {"step": lambda original, call, args, kwargs: seen.append(original) or call(*args, **kwargs)})
    assert one.step(1, 2, 3) == (3,) and copy.copy(one).step(1, 2, 4) == (4,) and other.step(1, 2, 5) == (5,)
    assert seen == [True, False]
    unwatch(one)
    one.step(1, 2, 3)
    assert len(seen) == 2
