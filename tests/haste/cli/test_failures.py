"""What ends a command: one sentence for what its user can mend, a traceback and what to send for a bug."""

from __future__ import annotations

import errno
import os
import sys

import pytest
import torch
from haste.cli.failures import answered
from haste.errors import UserError


def end(error: BaseException, capsys) -> tuple[int, str]:
    """The exit status and what is printed when a command raises this."""
    with pytest.raises(SystemExit) as exit_, answered("haste train", ["train", "--exp-name", "a b"]):
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
    with pytest.raises(type(error)), answered("haste train", ["train", "--exp-name", "a b"]):
        raise error
    sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does it at the end
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and type(error).__name__ in err
    assert "this is a bug of haste" in err and "command: haste train --exp-name 'a b'\n" in err
    assert f"torch {torch.__version__.partition('+')[0]}" in err


def test_ctrl_c_and_exits_keep_their_status(capsys):
    assert end(KeyboardInterrupt(), capsys) == (130, "haste train: interrupted\n")
    assert end(SystemExit(143), capsys) == (143, "")
