"""The interval schedule: the published counts, and what it refuses."""

from __future__ import annotations

import pytest
from haste.caching import IntervalSchedule
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
    assert [schedule.is_full(step, 7) for step in (7, 8, 9, 10)] == [True, False, False, True]


@pytest.mark.parametrize("settings, sentence", [((0, 2), "interval is 0"), ((3, 0), "first_enhance is 0")])
def test_settings_below_one(settings, sentence):
    with pytest.raises(UserError, match=sentence + "; it must be at least 1"):
        IntervalSchedule(*settings)


@pytest.mark.parametrize("settings, sentence", [((9, 2), "interval is 9"), ((3, 9), "first_enhance is 9")])
def test_settings_above_the_number_of_steps(settings, sentence):
    with pytest.raises(UserError, match=sentence + "; it must not be above the number of steps, 8"):
        IntervalSchedule(*settings).full_steps(8)
