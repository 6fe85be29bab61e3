"""The timer of a GPU, with a stand-in for it, whose clock moves when work is done and not when it is launched."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from haste_ext.bench import compare, report, token_cosine_loss
from haste_ext.bench.gpu_timer import CALLS_PER_GRAPH, CALLS_PER_SYNC, HOST_CALLS, GpuTimer
from haste_ext.bench.measure import make_timers


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
    case = token_cosine_loss.FeatureCase(2, 9, torch.float32, "cpu", 16)
    result = compare.compare(token_cosine_loss.OPERATION, case, False, 0.01, roofline)
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
