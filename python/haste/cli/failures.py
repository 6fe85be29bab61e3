"""What a command answers when it cannot go on: one sentence for what the user can mend, a traceback for a bug.

Readers and checks raise UserError, whose message is the sentence. Here is what only the system or a library can tell:
disks, permissions, memory, missing packages.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import select
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from haste import __version__
from haste.errors import UserError, in_one_line, missing_package

# Of the system's reasons for refusing a file those that are the user's to mend.
OF_THE_USER = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EIO, errno.EISDIR, errno.ELOOP,
    errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS, errno.ESTALE, errno.ETXTBSY,
}  # fmt: skip
LESS_MEMORY = {
    "train": "a smaller --batch-size, or more --gradient-accumulation-steps, takes less",
    "prepare": "a smaller --batch-size takes less",
    "sample": "a smaller --per-proc-batch-size takes less",
    "evaluate": "a smaller --per-proc-batch-size takes less",
    "sweep": "a smaller --per-proc-batch-size takes less",
}
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
CLOSED_PIPE = 128 + signal.SIGPIPE  # what shells report of a program whose reader has left


@contextmanager
def answered(command: str, words: Sequence[str]) -> Iterator[None]:
    """End the process with the status and the words that fit what is raised inside; a bug goes on to the caller.

    Args:
        command: `haste train` and the like, with which the sentence begins.
        words: what was typed after `haste`, for the report of a bug.
    """
    try:
        try:
            yield
        finally:
            flush()
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and any(map(reader_left, (sys.stdout, sys.stderr))):
            abandon(sys.stdout)
            raise SystemExit(CLOSED_PIPE) from None
        unwritable = what_output_refuses()
        if unwritable is not None:
            say(f"{command}: the output cannot be written: {unwritable.strerror}")
            raise SystemExit(2) from None
        text = sentence(error, command)
        if text is not None:
            say(f"{command}: {text}")
            raise SystemExit(2) from None
        report_below_traceback(bug_report(command, words))
        raise


def sentence(error: Exception, command: str) -> str | None:
    """What the user can do something about, in one sentence; None for a bug."""
    if isinstance(error, UserError) or isinstance(error, ImportError) and error.name == "haste_ext._C":
        return str(error)
    if of_memory(error):
        advice = LESS_MEMORY.get(command.removeprefix("haste "))
        return f"the memory is not enough ({in_one_line(error)})" + (f"; {advice}" if advice else "")
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        return None if top in ("haste", "haste_ext") else missing_package(top)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        if error.errno is None:
            return in_one_line(error)
        if error.errno in OF_THE_USER:
            name = "a file or the output" if error.filename is None else os.fsdecode(error.filename)
            return f"{name} cannot be used: {error.strerror}"
    return None


def of_memory(error: Exception) -> bool:
    """Whether the CPU's or the GPU's memory was not enough; torch has no common class for it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)


def bug_report(command: str, words: Sequence[str]) -> str:
    """What to send, below the traceback of a bug."""
    versions = [f"haste {__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "accelerate", "transformers", "diffusers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"\n{command}: this is a bug of haste. Please report it with the traceback above and these two lines:\n"
        f"  command: {shlex.join(['haste', *words])}\n"
        f"  versions: {', '.join(versions)}, {platform.platform()}"
    )


def report_below_traceback(report: str) -> None:
    """Let the interpreter, which shows the traceback of what ends it, show this below."""

    def show(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, place)
        say(report)

    sys.excepthook = show


def say(text: str) -> None:
    """Print to standard error, or nowhere if that is closed."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def flush() -> None:
    """Write what was printed now: at the interpreter's end nobody could answer for it."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def reader_left(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more, as behind `| head`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, no file behind it, or it is closed
        return False


def what_output_refuses() -> OSError | None:
    """The error of standard output, if it is that which cannot be written; then nothing more is written there."""
    try:
        flush()
    except OSError as error:
        abandon(sys.stdout)
        return error
    return None


def abandon(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, so that the interpreter's last flush is silent."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
