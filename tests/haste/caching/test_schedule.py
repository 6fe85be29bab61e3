"""Which steps are full: the published counts, lists, the rule that follows a measured error, and what is refused."""

from __future__ import annotations

import pytest
from haste.caching.schedule import AdaptiveSchedule, IntervalSchedule, ListedSchedule, describe_steps
from haste.errors import UserError


@pytest.mark.parametrize("interval, count", [(1, 50), (3, 18), (4, 14), (5, 11), (6, 10)])
def test_fifty_steps_have_the_published_number_of_full_ones(interval, count):
    """With two full steps at the beginning, and the interval counted from the second of them."""
    assert len(IntervalSchedule(interval, first_enhance=2).full_steps(50)) == count


@pytest.mark.parametrize(
    "interval, first_enhance, full",
    [(4, 2, [0, 1, 5, 9]), (4, 1, [0, 4, 8]), (3, 3, [0, 1, 2, 5, 8]), (2, 1, [0, 2, 4, 6, 8])],
)
def test_full_steps_of_ten(interval, first_enhance, full):
    assert IntervalSchedule(interval, first_enhance).full_steps(10) == full


def test_without_a_history_a_step_is_full_and_the_interval_begins_there():
    schedule = IntervalSchedule(3, first_enhance=1)
    assert schedule.is_full(7, None)
    assert [schedule.is_full(step, 7) for step in (8, 9, 10)] == [False, False, True]


@pytest.mark.parametrize("settings, sentence", [((0, 2), "--interval"), ((3, 0), "--first-enhance")])
def test_settings_below_one(settings, sentence):
    with pytest.raises(UserError, match=sentence + " must be at least 1, got 0"):
        IntervalSchedule(*settings)


@pytest.mark.parametrize("settings, sentence", [((9, 2), "--interval"), ((3, 9), "--first-enhance")])
def test_settings_above_the_number_of_steps(settings, sentence):
    with pytest.raises(UserError, match=sentence + " must not be above the number of steps, 8, got 9"):
        IntervalSchedule(*settings).full_steps(8)


def test_a_list_of_full_steps():
    schedule = ListedSchedule((0, 1, 4))
    course = schedule.begin(6)
    assert [course.is_full(step, 0) for step in range(6)] == [True, True, False, False, True, False]
    assert course.is_full(3, None)  # nothing to forecast from
    assert schedule.full_steps(6) == [0, 1, 4] and describe_steps([0, 1, 4]) == "0,1,4"


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 3, 2), (0, 2, 2)])
def test_lists_that_are_none(steps):
    with pytest.raises(UserError, match="--full-steps must be increasing step numbers that begin with 0, got "):
        ListedSchedule(steps)


def test_a_list_that_goes_beyond_the_run():
    with pytest.raises(UserError, match="--full-steps must be numbers from 0 to 7 for 8 steps, got 9"):
        ListedSchedule((0, 9)).begin(8)


def test_the_distance_follows_the_measured_error():
    """From n snapshots the error grows as distance^n: a bound of 8 times the error allows twice the distance for 3."""
    course = AdaptiveSchedule(error_threshold=0.08, max_interval=10).begin(50)
    intervals = []
    reports = [(0.04, 1, 1), (0.01, 2, 3), (0.0001, 4, 2), (0.08, 10, 2), (0.32, 6, 2), (9.0, 3, 1)]
    for error, distance, orders in reports:
        course.report(error, distance, orders)
        intervals.append(course.interval)
    assert intervals == [2, 4, 10, 10, 3, 1]
    assert course.is_full(12, 11) and not AdaptiveSchedule(0.08).begin(50).is_full(2, 2)


def test_before_anything_is_measured_every_step_is_full():
    course = AdaptiveSchedule(0.1).begin(20)
    assert [course.is_full(step, step - 1) for step in (1, 2, 3)] == [True] * 3


def test_a_bound_that_bounds_nothing():
    with pytest.raises(UserError, match="--error-threshold must be above 0, got 0"):
        AdaptiveSchedule(0)
