from __future__ import annotations

from dataclasses import replace

from haste.sweep.advice import advise, front, good_enough, recommend, worth_its_cache
from sweep_rows import cached_row, plain_row

FULL = plain_row(50, 2.0, label_accuracy=0.95)
PLAIN = [FULL, plain_row(25, 2.05, 40.0, label_accuracy=0.95), plain_row(10, 2.6, 30.0, label_accuracy=0.93)]


def fd(row):
    return row.fd


def test_the_front_is_what_nothing_is_faster_and_better_than():
    beaten = cached_row(3, 0.030, 2.08)
    better = cached_row(4, 0.020, 2.02)
    fast = cached_row(6, 0.005, 3.0)
    assert front([*PLAIN, beaten, better, fast], fd) == [fast, PLAIN[2], better, FULL]
    slower = replace(better, seconds=0.021)
    assert slower not in front([*PLAIN, better, slower], fd)


def test_good_enough_means_distance_and_accuracy():
    assert good_enough(cached_row(4, 0.01, 2.1, label_accuracy=0.94), FULL, 0.05)
    assert not good_enough(cached_row(4, 0.01, 2.11, label_accuracy=0.95), FULL, 0.05)
    assert not good_enough(cached_row(4, 0.01, 2.0, label_accuracy=0.93), FULL, 0.05)
    assert good_enough(cached_row(4, 0.01, 2.0, label_accuracy=None), FULL, 0.0)


def test_a_cache_is_worth_it_if_plain_runs_that_are_as_fast_agree_less():
    assert worth_its_cache(cached_row(4, 0.025, 2.0, 41.0), PLAIN)
    assert not worth_its_cache(cached_row(4, 0.025, 2.0, 39.0), PLAIN)
    assert worth_its_cache(cached_row(4, 0.024, 2.0, 39.0), PLAIN)  # the 25 uncached steps are slower
    assert not worth_its_cache(cached_row(4, 0.012, 2.0, 29.0), PLAIN)
    assert worth_its_cache(cached_row(4, 0.025, 2.0, None), PLAIN)


def test_the_fastest_that_is_good_enough_and_worth_it_is_recommended():
    poor = cached_row(6, 0.008, 2.5, 45.0, label_accuracy=0.95)
    outdone = cached_row(5, 0.011, 2.0, 25.0, label_accuracy=0.95)
    fast = cached_row(4, 0.0150, 2.0, 45.0, label_accuracy=0.95)
    as_fast_and_closer = cached_row(4, 0.0155, 2.0, 50.0, label_accuracy=0.95, order=2)
    slower_and_closer = cached_row(3, 0.020, 2.0, 60.0, label_accuracy=0.95)
    rows = [*PLAIN, poor, outdone, fast, slower_and_closer]
    assert recommend(rows, 0.05) is fast
    assert recommend([*rows, as_fast_and_closer], 0.05) is as_fast_and_closer
    assert recommend([*PLAIN, poor, outdone], 0.05) is None


def test_the_advice_says_what_plain_sampling_does_as_well():
    good = cached_row(4, 0.015, 2.0, 45.0, label_accuracy=0.95)
    words = advise([*PLAIN, good], 0.05)
    assert "Pareto front of seconds and FD, fastest first: Taylor per module, interval 4, order 1" in words
    assert "Recommended" in words and "(3.33× as fast, FD 2, 45.0 dB)" in words
    assert "The fastest uncached run with such an FD: 25 uncached steps (2.00× as fast, FD 2.05, 40.0 dB)" in words

    words = advise([*PLAIN, cached_row(4, 0.030, 2.2, 20.0)], 0.05)
    assert "No cached setting is on the Pareto front of seconds and FD." in words
    assert "No cached setting has an FD within 5% of 2" in words
