import errno
import logging

import pytest
from haste.training.logging import Backlog
from haste.training.run_dir import append


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_written_waits_in_its_order_and_is_reported_once(caplog):
    disk, written = {"full": False}, []

    def write(number):
        return lambda: full() if disk["full"] else written.append(number)

    backlog = Backlog("the log")
    with caplog.at_level(logging.WARNING):
        for number, disk["full"] in enumerate([False, True, True, False]):
            backlog.add(write(number))
            assert len(backlog) == (number if disk["full"] else 0)
    assert written == [0, 1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "the log cannot be written, and training goes on: [Errno 28]" in caplog.text


def test_the_end_says_what_is_lost(caplog):
    backlog = Backlog("the log")
    for _ in range(2):
        backlog.add(full)
    backlog.close()
    assert "the log lacks the last 2 entries" in caplog.text


def test_another_error_is_a_bug():
    with pytest.raises(KeyError):
        Backlog("the log").add(lambda: {}["missing"])


def test_a_line_is_appended_whole_or_not_at_all():
    with pytest.raises(OSError, match="No space"):
        append("/dev/full", "line\n")


def test_a_line_that_found_half_the_room_is_taken_back(tmp_path, monkeypatch):
    import resource
    import signal

    path = tmp_path / "log.jsonl"
    path.write_text("first line\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append(path, "second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "first line\n"
    append(path, "second line\n")
    assert path.read_text() == "first line\nsecond line\n"
