"""What ends a command: one sentence for what its user can mend, a traceback and what to send for a bug."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest
import torch
from haste.cli.console import PatientStream, check_launcher, check_optimize_level, exit_on_error, patient_stderr
from haste.errors import UserError
from tqdm import tqdm


def end(error: BaseException, capsys) -> tuple[int, str]:
    """The exit status and what is printed when a command raises this."""
    with pytest.raises(SystemExit) as exit_, exit_on_error("haste train", ["train", "--exp-name", "a b"]):
        raise error
    return exit_.value.code, capsys.readouterr().err


def refused(code: int, name: str | None = "exps/x") -> OSError:
    return OSError(code, os.strerror(code), name)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("--seed must be 1"), "--seed must be 1"),
        (refused(errno.ENOSPC), "exps/x cannot be used: No space left on device"),
        (refused(errno.EACCES), "exps/x cannot be used: Permission denied"),
        (refused(errno.ENAMETOOLONG), "exps/x cannot be used: File name too long"),
        (refused(errno.EISDIR), "exps/x cannot be used: Is a directory"),
        (refused(errno.ENOSPC, None), "a file or the output cannot be used: No space left on device"),
        (OSError("exps has 0.1 GiB free"), "exps has 0.1 GiB free"),
        (MemoryError("Unable to allocate 7 EiB"), "the memory is not enough (Unable to allocate 7 EiB); a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the memory is not enough (CUDA out of memory.); a smaller"),
        (ImportError("HASTE_CPU_CAPABILITY must be", name="haste_ext._C"), "HASTE_CPU_CAPABILITY must be"),
        (ModuleNotFoundError("No module", name="sklearn.datasets"), "the package scikit-learn is not installed: run"),
        (ModuleNotFoundError("No module", name="tyro"), "the package tyro is not installed: install it, or haste"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(capsys, error, sentence):
    code, err = end(error, capsys)
    assert code == 2
    assert err.startswith(f"haste train: {sentence}") and err.count("\n") == 1


def test_torch_without_memory_is_known_by_its_words(capsys):
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**62, dtype=torch.uint8)
    code, err = end(too_much.value, capsys)
    assert code == 2 and "--batch-size" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes"),
        ValueError("values"),
        AssertionError(),
        BrokenPipeError(errno.EPIPE, "of a worker"),
        ModuleNotFoundError("No module named 'haste.nonsense'", name="haste.nonsense"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_anything_else_is_a_bug_and_says_what_to_send(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "excepthook", None)
    with pytest.raises(type(error)), exit_on_error("haste train", ["train", "--exp-name", "a b"]):
        raise error
    sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does it at the end
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and type(error).__name__ in err
    assert "this is a bug of haste" in err and "command: haste train --exp-name 'a b'\n" in err
    assert f"torch {torch.__version__.partition('+')[0]}" in err


def test_ctrl_c_and_exits_keep_their_status(capsys):
    assert end(KeyboardInterrupt(), capsys) == (130, "haste train: interrupted\n")
    with pytest.raises(SystemExit), exit_on_error("haste sample", []):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "haste sample: interrupted; the same command resumes\n"
    assert end(SystemExit(143), capsys) == (143, "")


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
        PatientStream(Full(errno.EPIPE)).write("text")
    stream = io.StringIO()
    PatientStream(stream).write("text")
    assert PatientStream(stream).getvalue() == "text"


LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "4"}, LAUNCHED])
def test_what_launchers_set_is_taken(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"RANK": "one"}, "RANK must be a whole number of at least 0, got 'one'"),
        ({"RANK": ""}, "RANK must be a whole number of at least 0, got ''"),
        ({"RANK": "-1"}, "RANK must be a whole number of at least 0, got '-1'"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE, which is 2, got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number of at least 0, got 'http'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set where LOCAL_RANK is"),
    ],
)
def test_what_cannot_be_is_named(changes, sentence):
    environment = {name: value for name, value in {**LAUNCHED, **changes}.items() if value is not None}
    with pytest.raises(UserError) as error:
        check_launcher(environment)
    assert str(error.value).startswith(sentence)


def test_python_without_docstrings_is_refused():
    check_optimize_level(1)
    with pytest.raises(UserError, match="PYTHONOPTIMIZE .* must be 0 or 1, got 2"):
        check_optimize_level(2)
