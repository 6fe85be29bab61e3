"""Which steps are full, and which call of a run a call is: none is forecast from another image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import CacheConfig, CachedModel, enable_cache
from haste.caching.schedule import Clock, ScheduleState, describe_steps
from haste.errors import UserError
from haste.samplers import Guidance, ModelCall, model_calls, times_at


def schedule(num_steps: int = 50, **settings) -> ScheduleState:
    return ScheduleState(CacheConfig(cache="taylor", order=0, **settings), num_steps)


def test_without_a_history_a_step_is_full_and_the_interval_begins_there():
    state = schedule(interval=3, first_enhance=1)
    assert state.is_full(7, None)
    assert [state.is_full(step, 7) for step in (8, 9, 10)] == [False, False, True]


@pytest.mark.parametrize("first_enhance", [1, 2, 3, 4])
@pytest.mark.parametrize("interval", range(1, 7))
def test_the_steps_of_a_run_are_those_of_its_plan(interval, first_enhance):
    state, full = schedule(30, interval=interval, first_enhance=first_enhance), []
    for step in range(30):
        full += [step] if state.is_full(step, full[-1] if full else None) else []
    config = CacheConfig(cache="taylor", interval=interval, first_enhance=first_enhance)
    assert full == config.planned_full_steps(30)


@pytest.mark.parametrize("num_steps, interval", [(30, 4), (29, 6), (8, 2), (5, 1)])
def test_even_steps_are_full_and_no_others(num_steps, interval):
    state = schedule(num_steps, interval=interval, spacing="even")
    planned = CacheConfig(cache="taylor", interval=interval, spacing="even").planned_full_steps(num_steps)
    assert [step for step in range(num_steps) if state.is_full(step, 0)] == planned
    assert state.is_full(3, None)  # nothing to forecast from


def test_a_list_of_full_steps():
    state = schedule(6, full_steps="0,1,4")
    assert [state.is_full(step, 0) for step in range(6)] == [True, True, False, False, True, False]
    assert state.is_full(3, None)  # nothing to forecast from
    assert describe_steps([0, 1, 4]) == "0,1,4"


def test_the_distance_follows_the_measured_error():
    """Of n cached features the error grows as distance^n: a bound of 8 times the error allows twice the distance for
    3."""
    state = schedule(error_threshold=0.08)
    intervals = []
    reports = [(0.04, 1, 1), (0.01, 2, 3), (0.0001, 4, 2), (0.08, 10, 2), (0.32, 6, 2), (9.0, 3, 1)]
    for error, distance, count in reports:
        state.report(error, distance, count)
        intervals.append(state.interval)
    assert intervals == [2, 4, 10, 10, 3, 1]
    assert state.is_full(12, 11) and not schedule(error_threshold=0.08).is_full(2, 2)


def test_before_anything_is_measured_every_step_is_full():
    state = schedule(20, error_threshold=0.1)
    assert [state.is_full(step, step - 1) for step in (1, 2, 3)] == [True] * 3


# ---- the clock ----

MODEL = small_sit().double()
STEPS = 10
SHIFTED = [3 * s / (1 + 2 * s) for s in (1 - step / STEPS for step in range(STEPS))]  # as flow-matching pipelines shift
HALVES = model_calls("euler", STEPS, Guidance(2.0, mode="separate"))
PLANS = {"number": {"num_steps": STEPS}, "times": {"times": SHIFTED}}


def fast(**settings) -> CachedModel:
    return enable_cache(MODEL, **{"cache": "newton", "granularity": "model", "interval": 3, "order": 2, **settings})


def at(time: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full((2,), time, dtype=dtype)


@torch.no_grad()
def run(cached: CachedModel, times=SHIFTED, scale: float = 1.0, steps: int | None = None) -> torch.Tensor:
    """Euler, by hand; `scale` makes another image. steps: broken off after so many."""
    x, y = small_noise(dtype=torch.float64)
    x = scale * x
    for t, t_next in list(zip(times, [*times[1:], 0.0], strict=True))[:steps]:
        x = x + (t_next - t) * cached(x, at(t), y)[0]
    return x


@torch.no_grad()
def newton_by_hand() -> torch.Tensor:
    """The last tokens of the full steps, extrapolated over the times at which they were really computed."""
    x, y = small_noise(dtype=torch.float64)
    held: list[tuple[float, torch.Tensor]] = []
    for step, (t, t_next) in enumerate(zip(SHIFTED, [*SHIFTED[1:], 0.0], strict=True)):
        tokens, c = MODEL.embed(x, at(t), y)
        if step in (0, 1, 4, 7):
            for block in MODEL.blocks:
                tokens = block(tokens, c)[0]
            held = [*held, (t, tokens)][-3:]
        else:
            tokens = sum(
                math.prod((t - other) / (own - other) for other, _ in held if other != own) * kept for own, kept in held
            )
        x = x + (t_next - t) * MODEL.finish(tokens, c)
    return x


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_newton_goes_by_the_times_of_the_calls_however_they_are_spaced(plan):
    cached = fast(**plan)
    torch.testing.assert_close(run(cached), newton_by_hand(), rtol=1e-5, atol=1e-5)  # the weights are float32
    assert cached.full_steps == [0, 1, 4, 7]


@pytest.mark.parametrize("order", [1, -1])
def test_times_may_fall_or_rise_in_any_unit(order):
    """DiT counts 999 to 0 in integers, SiT from 0 to 1."""
    clock = Clock(5)
    times = [999, 800, 500, 200, 0][::order]
    for time in times:
        call = clock.next_call(torch.full((3,), time))
        assert call.time == time
        clock.count(call)
    assert clock.next_call(torch.full((3,), times[0])) is None  # the next run


@pytest.mark.parametrize("steps", [2, 5, 9, STEPS])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_that_was_broken_off_and_one_that_is_over_are_followed_by_another(plan, steps, caplog):
    cached, fresh = fast(**plan), run(fast(**plan), scale=0.5)
    run(cached, steps=steps)
    assert torch.equal(run(cached, scale=0.5), fresh)
    assert (cached.num_full, cached.num_forecast) == (4, 6)
    needed = "num_steps must be the number" if "num_steps" in plan else "model_calls= or times= must list the calls"
    sentence = f"the last run had {steps} of its 10 calls; {needed}"
    assert [sentence in record.getMessage() for record in caplog.records] == ([True] if steps < STEPS else [])


def test_runs_that_are_shorter_than_the_plan_are_told_of_once(caplog):
    cached = fast(num_steps=2 * STEPS)
    for _ in range(3):
        run(cached)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the last run had 10 of its 20 calls; num_steps must be the number of calls of a run"
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_that_was_broken_off_after_its_first_call_is_not_told_from_a_second_call(plan):
    cached = fast(**plan)
    run(cached, steps=1)
    with pytest.raises(UserError, match="start"):
        run(cached, scale=0.5)
    cached.start(next(iter(plan.values())))
    assert torch.equal(run(cached, scale=0.5), run(fast(**plan), scale=0.5))


@pytest.mark.parametrize("steps", [STEPS, 2 * STEPS])
@torch.no_grad()
def test_halves_of_guidance_one_by_one_need_a_plan_that_says_so(steps):
    x, y = small_noise(dtype=torch.float64)
    cached = fast(num_steps=steps)
    cached(x, at(1.0), y)
    with pytest.raises(UserError, match="called twice at t = 1, .* pass model_calls="):
        cached(x, at(1.0), torch.full_like(y, 10))


@torch.no_grad()
def test_halves_that_their_plan_knows_are_each_forecast_from_their_own():
    x, y = small_noise(dtype=torch.float64)
    cached, alone = fast(model_calls=HALVES), [fast(num_steps=STEPS) for _ in range(2)]
    for step in range(STEPS):
        t = at(1 - step / STEPS)
        for model, labels in zip(alone, (y, torch.full_like(y, 10)), strict=True):
            torch.testing.assert_close(
                cached(x, t, labels).prediction, model(x, t, labels).prediction, rtol=0, atol=1e-12
            )


@torch.no_grad()
def test_a_run_broken_off_between_its_halves_does_not_get_through_another_image():
    x, y = small_noise(dtype=torch.float64)
    for calls in range(1, 6):
        cached = fast(model_calls=HALVES)
        for call in range(calls):
            cached(x, at(1 - call // 2 / STEPS), y)
        if calls > 2:  # after the first step its first time begins anew
            cached(x, at(1.0), y)
            assert cached.num_full == 1
            continue
        with pytest.raises(UserError, match="call 3 of this run has t = 1, and the plan has 0.9 there"):
            for _ in range(2):
                cached(x, at(1.0), y)


@pytest.mark.parametrize(
    "plan, times, sentence",
    [
        (STEPS, [1.0, 0.9, 0.8, 0.9], "called at t = 0.9 after 0.8, in a run that began at 1; before another run"),
        (STEPS, [0.1, 0.2, 0.15], "called at t = 0.15 after 0.2, in a run that began at 0.1"),
        (STEPS, [1.0, math.nan], "t must be finite, got nan"),
        (2, [1.0, 0.5, 0.2], "this run had 2 calls of the model and is over, and the model was called at t = 0.2"),
        ([1.0, 0.5, 0.2], [1.0, 0.2], "call 2 of this run has t = 0.2, and the plan has 0.5 there; pass the times"),
        ([1.0, 0.5, 0.2], [0.999], "call 1 of this run has t = 0.999, and the plan has 1 there"),
        (model_calls("heun", 3), [1.0, 1.0], "call 2 of this run has t = 1, and the plan has 0.666667 there"),
    ],
)
def test_calls_out_of_step(plan, times, sentence):
    cached = fast(full_steps="0", order=0, cache="reuse", interval=None)
    cached.start(plan)
    x, y = small_noise(dtype=torch.float64)
    with pytest.raises(UserError, match=sentence):
        for time in times:
            cached(x, at(time), y)


def test_one_time_for_the_whole_batch():
    x, y = small_noise(dtype=torch.float64)
    with pytest.raises(UserError, match="t must be one time for the whole batch, got 0.5 to 1"):
        fast(num_steps=STEPS)(x, torch.tensor([1.0, 0.5]), y)


@torch.no_grad()
def test_a_batch_without_two_halves_is_refused():
    x, y = small_noise(3, torch.float64)
    plan = model_calls("euler", STEPS, Guidance(2.0))
    with pytest.raises(UserError, match="x must have as many rows for cond as for uncond, got 3 rows"):
        fast(model_calls=plan)(x, torch.ones(3).double(), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [4, 50, 100])
def test_a_time_may_be_rounded_to_its_type(dtype, steps):
    clock = Clock([1 - step / steps for step in range(steps)])
    for step in range(steps):
        t = torch.ones(1, dtype=dtype) - torch.tensor(step, dtype=dtype) / steps
        clock.count(clock.next_call(t))


def test_a_call_that_failed_may_be_made_again():
    clock = Clock(3)
    clock.count(clock.next_call(at(1.0)))
    assert clock.next_call(at(0.5)) == clock.next_call(at(0.5)) == ModelCall(1, 1, 0.5)


def test_a_time_that_knows_its_value_is_not_asked_for_it(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "aminmax", None)
    clock = Clock(model_calls("euler", 2))
    assert clock.next_call(times_at(1.0, 2, torch.bfloat16, torch.device("cpu"))).time == 1.0


@pytest.mark.parametrize(
    "plan, sentence",
    [
        (0, "num_steps must be an integer from 1 to 10,000, got 0"),
        (10**9, "num_steps must be an integer from 1 to 10,000, got 1000000000"),
        (2.5, "a run must be a number of steps, times or model calls, got 2.5"),
        ("50", "a run must be a number of steps, times or model calls, got '50'"),
        ([1.0, math.nan], "a run must be a number of steps"),
        ([1.0, 0.5, 0.5], "times must fall, or rise, from each to the next, got .* pass model_calls="),
        ([1.0, 0.5, 0.7], "times must fall, or rise"),
    ],
)
def test_plans_that_are_none(plan, sentence):
    with pytest.raises(UserError, match=sentence):
        Clock(plan)


def test_times_may_be_of_any_kind():
    for times in ([3, 2, 1], (3.0, 2.0, 1.0), np.array([3, 2, 1]), torch.tensor([3, 2, 1])):
        assert [call.time for call in Clock(times).plan] == [3, 2, 1]
