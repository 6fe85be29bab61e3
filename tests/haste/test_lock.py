import errno
import logging
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from haste import io
from haste.errors import UserError
from haste.io import hold

HOLDER = """
import sys, time
from pathlib import Path
from haste.lock import hold
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
    assert holder.poll() is None and (folder / io.LOCK).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / io.LOCK).exists()  # nobody has removed it, and nobody holds it
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
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [io.LOCK]
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b", "it is"):
        (tmp_path / "a" / "b" / "result").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(io.fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING), hold(tmp_path, "it is"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be used"), hold(tmp_path / "file" / "run", "it is"):
        pass


ADDER = """
import json, sys
from pathlib import Path
from haste.lock import updating
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
