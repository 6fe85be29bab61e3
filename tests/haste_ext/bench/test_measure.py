"""How calls are timed and their memory is counted; never how fast anything is."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import pytest
import torch

from haste_ext.bench import compare, report
from haste_ext.bench.measure import (
    CALLS_PER_GRAPH,
    CALLS_PER_SYNC,
    ENOUGH,
    HOST_CALLS,
    TURNS,
    GpuTimer,
    make_timers,
    memory_within_the_machine,
    peak_extra_bytes,
    spread,
    times_in_turns,
)
from haste_ext.bench.operations import OPERATIONS, FeatureCase

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


# --- on a GPU, with a stand-in for it, whose clock moves when work is done and not when it is launched ---


class Device:
    """A GPU that does its work at once; work launched while a graph is captured is recorded, and done by replays."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.stream = "default"
        self.replays = 0

    def launch(self, seconds):
        if self.capturing is None:
            self.now += seconds
        else:
            self.capturing.append(seconds)


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = device.now

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    class Graph(list):
        def replay(self):
            device.replays += 1
            device.now += sum(self)

    @contextmanager
    def capture(graph, pool, stream):
        device.capturing, device.stream, device.pool = graph, stream, pool
        yield  # as torch's: what fails inside leaves the stream in force
        device.capturing, device.stream = None, "default"

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def stream(stream):
        yield

    def set_stream(stream):
        device.capturing, device.stream = None, stream

    stand_ins = {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": Stream, "stream": stream,
        "current_stream": lambda: device.stream, "set_stream": set_stream, "synchronize": lambda: None,
        "graph_pool_handle": lambda: "pool",
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    empty = torch.empty

    def on_the_cpu(*size, **kwargs):
        return empty(16, dtype=kwargs["dtype"]) if kwargs.get("device") == "cuda" else empty(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    return device


def rotated(device, seconds, count):
    launched = []

    def call(i):
        launched.append(i)
        device.launch(seconds)

    return [lambda i=i: call(i) for i in range(count)], launched


def test_a_graph_holds_all_inputs_in_turn_and_only_the_device_is_timed(device):
    calls, launched = rotated(device, 1e-4, 6)
    timer = GpuTimer(calls)
    captured = launched[3:]
    assert captured == list(range(6)) * (len(captured) // 6), "in rounds"
    assert len(captured) * 1e-4 == pytest.approx(2.4e-3), "one replay is long beside its start"
    count, times = len(launched), timer.times(0.01)
    assert times == pytest.approx([1e-4] * 5) and len(launched) == count, "nothing is launched by the host"
    assert timer.why_events is None and device.stream == "default"


def test_a_graph_of_something_very_short_stays_small(device):
    calls, launched = rotated(device, 1e-9, 5)
    assert GpuTimer(calls).calls_per_replay <= CALLS_PER_GRAPH
    assert GpuTimer(rotated(device, 1.0, 3)[0]).calls_per_replay == 3


def test_what_no_graph_can_hold_is_timed_by_events_and_says_so(device):
    launched = []

    def waits(i):
        launched.append(i)
        if device.capturing is not None:
            raise RuntimeError("operation not permitted\n when stream is capturing")
        device.launch(2e-3)

    timer = GpuTimer([lambda i=i: waits(i) for i in range(3)])
    assert timer.why_events == "operation not permitted when stream is capturing"
    assert device.stream == "default" and device.capturing is None
    del launched[:]
    times = timer.times(0.01)
    assert times == pytest.approx([2e-3] * CALLS_PER_SYNC) and launched[:4] == [0, 1, 2, 0]
    assert not device.replays


def test_host_time_is_a_number_of_its_own(device):
    calls, launched = rotated(device, 1.0, 2)
    timer = GpuTimer(calls)
    del launched[:]
    times = timer.host_times()
    assert len(times) == len(launched) == HOST_CALLS and max(times) < 0.5, "the device's second does not count"


def test_contenders_share_the_memory_of_their_graphs(device):
    timers = make_timers({name: rotated(device, 1e-3, 2)[0] for name in "ab"}, "cuda")
    assert device.pool == "pool" and [timer.calls_per_replay for timer in timers.values()] == [2, 2]


def test_a_case_is_compared_by_graphs_and_says_what_the_host_took(device, monkeypatch):
    """The contenders compute on the CPU; each then takes the stand-in 1 ms."""

    def timers(contenders, where):
        def timed(call):
            device.launch(1e-3)
            return call()

        return {name: GpuTimer([lambda c=c: timed(c) for c in calls]) for name, calls in contenders.items()}

    monkeypatch.setattr(compare, "make_timers", timers)
    monkeypatch.setattr(compare, "compiled", lambda function: function)
    monkeypatch.setattr(compare, "rotations", lambda case: 3)
    roofline = {"copy_bytes_per_second": 1e12, "matmul_flops_per_second": {"float32": 1e12}, "exps_per_second": None}
    case = FeatureCase(2, 9, torch.float32, "cpu", 16)
    result = compare.compare(OPERATIONS["token_cosine_loss"], case, False, 0.01, roofline)
    rows = {row["name"]: row for row in result["rows"] if "absent" not in row}
    assert {"haste", "a copy of the same bytes"} <= rows.keys()
    for row in rows.values():
        assert row["seconds"]["median"] == pytest.approx(1e-3) and row["timed_by_events"] is None
        assert 0 < row["host_seconds"]["median"] < 1
    assert "host µs per call: " in report.case_table(result)


def test_the_table_says_how_calls_were_launched():
    host = {"median": 51e-6}
    rows = [
        {"name": "eager", "host_seconds": host, "timed_by_events": None},
        {"name": "haste", "host_seconds": host, "timed_by_events": "it waits"},
        {"name": "compiled", "absent": "no compiler"},
    ]
    assert report.launching(rows) == [
        "host µs per call: eager 51, haste 51",
        "timed by events, not in a CUDA graph: haste (it waits)",
    ]
    assert report.launching([{"name": "on a CPU"}]) == []
