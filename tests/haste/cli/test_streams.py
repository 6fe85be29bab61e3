import errno
import io
import sys

import pytest
from haste.cli.terminal import Patient, patient_stderr
from tqdm import tqdm


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, "cannot be written")

    def flush(self):
        raise OSError(self.number, "cannot be flushed")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_progress_bar_on_a_full_disk_ends_nothing(monkeypatch, number):
    monkeypatch.setattr(sys, "stderr", Full(number))
    with pytest.raises(OSError), tqdm(total=3) as bar:
        bar.update()
    before = sys.stderr
    with patient_stderr():
        for _ in tqdm(range(3), mininterval=0):
            pass
        print("done", file=sys.stderr, flush=True)
    assert sys.stderr is before


def test_other_errors_are_raised_and_all_else_is_the_stream():
    with pytest.raises(OSError):
        Patient(Full(errno.EPIPE)).write("text")
    stream = io.StringIO()
    Patient(stream).write("text")
    assert Patient(stream).getvalue() == "text"
