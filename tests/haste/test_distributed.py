"""Signals and progress bars."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest
from haste import distributed
from haste.distributed import StopRequest, progress_bar, watched


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert signal.getsignal(number) is before  # a second one acts as usual
    assert signal.getsignal(number) is before


def test_without_a_signal_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def printed(monkeypatch, terminal) -> list[str]:
    """What a bar of 20 steps, a second of tqdm's clock each, prints."""
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    with progress_bar(total=20, desc="sample", unit="image") as bar:
        bar._time = lambda: bar.start_t + bar.n
        for _ in range(20):
            bar.update()
            bar.set_postfix(loss="1", refresh=False)
    return [line for line in sys.stderr.getvalue().replace("\n", "\r").split("\r") if line.strip()]


def test_a_bar_that_nobody_watches_is_printed_rarely(monkeypatch):
    lines = printed(monkeypatch, terminal=False)
    assert len(lines) <= 4 and "0/20" in lines[0] and "20/20" in lines[-1] and "10/20" in lines[1]


def test_a_bar_on_a_terminal_is_printed_as_it_moves(monkeypatch):
    assert len(printed(monkeypatch, terminal=True)) >= 20


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_no_standard_error_is_no_terminal(monkeypatch, stream):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert not watched() and distributed.RARELY >= 10


def test_the_bar_goes_along_with_what_it_is_given(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert list(progress_bar(range(3), desc="teacher")) == [0, 1, 2]
