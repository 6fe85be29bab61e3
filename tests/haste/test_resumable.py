import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from haste import resumable
from haste.errors import UserError
from haste.resumable import ResumableDir, append_line, hold, read_lines


class Samples(ResumableDir):
    flag, content, record_name = "--sample-dir", "samples", "sample.json"


SETTINGS = {"steps": 4, "size": (8, 8)}


def begun(path):
    folder = Samples(path, SETTINGS)
    folder.write_record({**folder.settings, "seconds": 1.5})
    return folder


def test_opening_a_new_folder_writes_nothing(tmp_path):
    assert Samples(tmp_path / "new", SETTINGS).saved is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_settings_reopen_a_folder_with_its_record(tmp_path):
    begun(tmp_path / "s")
    assert Samples(tmp_path / "s", SETTINGS).saved == {"steps": 4, "size": [8, 8], "seconds": 1.5}


def test_other_settings_are_refused_by_flag_and_name(tmp_path):
    begun(tmp_path / "s")
    with pytest.raises(UserError, match="^--sample-dir must .* holds samples with steps 4, not 5; cfg unset, not 2$"):
        Samples(tmp_path / "s", {**SETTINGS, "steps": 5, "cfg": 2})
    with pytest.raises(UserError, match="c unset, not 3 and others$"):
        Samples(tmp_path / "s", {**SETTINGS, **{"a": 1, "b": 2, "c": 3, "d": 4}})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for path in (tmp_path, tmp_path / "notes"):
        with pytest.raises(UserError, match="^--sample-dir must be .* which holds something else$"):
            Samples(path, SETTINGS)


def test_a_damaged_record_is_refused_by_name(tmp_path):
    (tmp_path / "sample.json").write_text('{"steps": 4')
    with pytest.raises(UserError, match="sample.json must be the record of samples, but is no JSON"):
        Samples(tmp_path, SETTINGS)


def test_one_command_at_a_time_and_it_sees_what_another_has_done_meanwhile(tmp_path):
    waiting = Samples(tmp_path / "s", SETTINGS)
    first = begun(tmp_path / "s")
    with (
        first.hold(),
        pytest.raises(UserError, match="^--sample-dir .* is in use by .* another --sample-dir"),
    ):
        with waiting.hold():
            pytest.fail("held twice")
    with waiting.hold():
        assert waiting.saved["seconds"] == 1.5


def test_a_record_that_cannot_be_written_names_the_flag(tmp_path):
    folder = Samples(tmp_path / "s", SETTINGS)
    (tmp_path / "s" / "sample.json").mkdir(parents=True)
    with pytest.raises(UserError, match="^--sample-dir .* cannot be written: .*; existing files are kept"):
        folder.write_record({})


# ---- JSON Lines ----


def test_lines_are_read_and_others_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == ([], 0)
    path.write_bytes(b'{"a": 1}\n[2]\n\n\xff\n{"a": 3}\n{"a": 4')
    assert read_lines(path) == ([{"a": 1}, {"a": 3}], 2)
    with pytest.raises(UserError, match="it is a folder"):
        read_lines(tmp_path)


@pytest.mark.parametrize(("tail", "left"), [("", [1]), ('{"a": 2', [1]), ('{"a": 2}', [1, 2]), ("x" * 200_000, [1])])
def test_a_last_line_that_was_cut_short_makes_way_for_the_next(tmp_path, tail, left):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n' + tail)
    append_line(path, {"a": 9})
    assert path.read_text() == "".join(f'{{"a": {number}}}\n' for number in [*left, 9])


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"a": 1}, durable=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            append_line(path, {"a": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == '{"a": 1}\n'


# ---- locks ----

HOLDER = """
import sys, time
from pathlib import Path
from haste.resumable import hold
with hold(Path(sys.argv[1]), "it is"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_another_process_holds_is_refused_until_that_dies(tmp_path, holder):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"^run x is held by process {holder.pid} on .* since 20.*; wait"):
        with hold(folder, "run x is held", "wait"):
            pytest.fail("held twice")
    assert holder.poll() is None and (folder / resumable.LOCK).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / resumable.LOCK).exists()  # nobody has removed it, and nobody holds it
    with hold(folder, "run x is held"):
        pass


def test_the_same_process_does_not_hold_a_folder_twice(tmp_path):
    with hold(tmp_path, "run x is held"):
        with pytest.raises(UserError, match=f"by this process, {os.getpid()}"), hold(tmp_path / ".", "run x is held"):
            pytest.fail("held twice")
        with pytest.raises(UserError):  # the refusal did not let go of it
            with hold(tmp_path, "run x is held"):
                pytest.fail("held twice")
    with hold(tmp_path, "run x is held"):
        pass


def test_a_lock_leaves_nothing_behind(tmp_path):
    with hold(tmp_path / "a" / "b", "it is"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [resumable.LOCK]
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b", "it is"):
        (tmp_path / "a" / "b" / "result").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(resumable.fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING), hold(tmp_path, "it is"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="must be a folder that can be written, got .*file/run: Not"),
        hold(tmp_path / "file" / "run", "it is"),
    ):
        pass


ADDER = """
import json, sys
from pathlib import Path
from haste.resumable import updating
path = Path(sys.argv[1])
for _ in range(100):
    with updating(path):
        path.write_text(str(int(path.read_text()) + 1))
"""


def test_updates_of_several_processes_are_all_kept(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(subprocess.Popen([sys.executable, "-c", ADDER, str(path)]))
    assert path.read_text() == "300"
    assert [file.name for file in tmp_path.iterdir()] == ["count"]
