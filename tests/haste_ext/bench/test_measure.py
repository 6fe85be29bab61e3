"""How calls are timed and their memory is counted; never how fast anything is."""

from __future__ import annotations

import resource
from pathlib import Path
from time import sleep

import pytest
import torch

from haste_ext.bench.measure import (
    ENOUGH,
    TURNS,
    make_timers,
    memory_within_the_machine,
    peak_extra_bytes,
    spread,
    times_in_turns,
)

on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the count is Linux's")


def test_contenders_take_turns_and_none_is_always_first():
    order = []
    contenders = {name: [lambda name=name: order.append(name)] for name in "abc"}
    times = times_in_turns(make_timers(contenders, "cpu"), 1e-4)
    turns = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert turns == [*"abc", *"bca", *"cab", *"abc", *"bca"][: 3 * TURNS]
    assert set(times) == set("abc") and all(len(own) >= TURNS for own in times.values())


def test_a_slow_call_is_timed_three_times_and_a_quick_one_in_every_turn():
    calls = {"slow": [lambda: sleep(0.02)], "quick": [lambda: None]}
    times = times_in_turns(make_timers(calls, "cpu"), 0.01)
    assert len(times["slow"]) == ENOUGH
    assert len(times["quick"]) >= TURNS


def test_spread():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "measurements": 6}


@on_linux
def test_peak_memory_counts_what_the_call_holds_but_not_its_results():
    mebibytes = 2**20 // 4

    def call():
        temporary = torch.ones(96 * mebibytes)
        return (temporary[: 32 * mebibytes] * 2,)

    # 96 MiB; without the temporary it would be 0, with the results 128. The mark may lag behind by as much as a result.
    assert 60 * 2**20 < peak_extra_bytes(call, "cpu") < 110 * 2**20


@on_linux
def test_more_memory_than_the_machine_has_is_an_error_not_a_death():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_within_the_machine("cpu"), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**42)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
