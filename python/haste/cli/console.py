"""How a command ends and what it prints: exit statuses, one-sentence errors, bug reports, streams, the environment.

Readers and checks raise UserError, whose message is the sentence. Here are the errors that only the system or a library
can report: disks, permissions, memory, missing packages.
"""

from __future__ import annotations

import codecs
import errno
import importlib.metadata
import os
import platform
import select
import shlex
import shutil
import signal
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from haste import __version__
from haste.errors import UserError, in_one_line, missing_package

# ---- errors ----

# The system's reasons for refusing a file that the user can do something about.
USER_ERRNOS = {
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
RESUMED = {"haste sample", "haste evaluate", "haste sweep", "haste demo"}  # train and prepare tell it themselves
CLOSED_PIPE = 128 + signal.SIGPIPE  # what shells report of a program whose reader has closed the pipe


@contextmanager
def exit_on_error(command: str, words: Sequence[str]) -> Iterator[None]:
    """Turn errors inside this block into one sentence and an exit status; a bug is raised, with a report below it.

    Args:
        command: `haste train` and the like, with which the sentence begins.
        words: the arguments after `haste`, for the report of a bug.
    """
    try:
        try:
            yield
        finally:
            flush_output()
    except KeyboardInterrupt:
        print_error(f"{command}: interrupted" + ("; the same command resumes" if command in RESUMED else ""))
        raise SystemExit(130) from None
    except Exception as error:  # one sentence if the user can correct it, else a traceback
        if isinstance(error, BrokenPipeError) and any(map(reader_left, (sys.stdout, sys.stderr))):
            discard(sys.stdout)
            raise SystemExit(CLOSED_PIPE) from None
        output_error = error_of_output()
        if output_error is not None:
            print_error(f"{command}: the output cannot be written: {output_error.strerror}")
            raise SystemExit(2) from None
        text = sentence(error, command)
        if text is not None:
            print_error(f"{command}: {text}")
            raise SystemExit(2) from None
        print_below_traceback(bug_report(command, words))
        raise


def sentence(error: Exception, command: str) -> str | None:
    """One sentence on an error that the user can do something about; None for a bug."""
    if isinstance(error, UserError) or isinstance(error, ImportError) and error.name == "haste_ext._C":
        return str(error)
    if is_out_of_memory(error):
        advice = LESS_MEMORY.get(command.removeprefix("haste "))
        return f"the memory is not enough ({in_one_line(error)})" + (f"; {advice}" if advice else "")
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        return None if top in ("haste", "haste_ext") else missing_package(top)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        if error.errno is None:
            return in_one_line(error)
        if error.errno in USER_ERRNOS:
            name = "a file or the output" if error.filename is None else os.fsdecode(error.filename)
            return f"{name} cannot be used: {error.strerror}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the CPU or the GPU ran out of memory; torch has no common class for it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)


def bug_report(command: str, words: Sequence[str]) -> str:
    """What to send, printed below the traceback of a bug."""
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


def print_below_traceback(report: str) -> None:
    """Have the interpreter, which prints the traceback of an uncaught error, print this below it."""

    def show(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, place)
        print_error(report)

    sys.excepthook = show


# ---- streams ----


def print_error(text: str) -> None:
    """Print to standard error, or nowhere if that is closed."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def flush_output() -> None:
    """Write what was printed now: an error at the interpreter's own flush could not be handled."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def reader_left(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose reader has closed it, as behind `| head`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, no file behind it, or it is closed
        return False


def error_of_output() -> OSError | None:
    """The error with which standard output cannot be written, if any; then nothing more is written there."""
    try:
        flush_output()
    except OSError as error:
        discard(sys.stdout)
        return error
    return None


def discard(stream: TextIO) -> None:
    """Send what is still buffered to the null device, so that the interpreter's last flush is silent."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass


# A full disk under a redirected stream, which may have room later. A closed pipe does end a command.
IGNORED_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class PatientStream:
    """A text stream that drops what cannot be written now, in place of raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._raise_unless_ignored(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._raise_unless_ignored(error)

    @staticmethod
    def _raise_unless_ignored(error: OSError) -> None:
        if error.errno not in IGNORED_ERRNOS:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_stderr() -> Iterator[None]:
    """Keep progress bars and messages, which go to stderr, from ending the command inside this block."""
    stream = sys.stderr
    sys.stderr = PatientStream(stream)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stream


ASCII = {
    "→": "->", "←": "<-", "×": "x", "·": "*", "–": "-", "—": "-", "−": "-", "…": "...", "±": "+-", "≤": "<=", "≥": ">=",
    "≈": "~", "√": "sqrt", "Δ": "Delta", "τ": "tau", "λ": "lambda", "μ": "u", "µ": "u", "σ": "sigma", "‖": "||",
    "“": '"', "”": '"', "‘": "'", "’": "'", "─": "-", "│": "|", "█": "#", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip


def accept_any_text() -> None:
    """Make stdout and stderr replace letters that their encoding lacks (`Fréchet`: `Frechet`), in place of raising.

    What is printed to a closed one is dropped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
    codecs.register_error("haste.ascii", to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="haste.ascii")


def to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `codecs`: each letter by ASCII, else without its accent, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error

    def replacement(letter: str) -> str:
        return ASCII.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"

    return "".join(map(replacement, error.object[error.start : error.end])), error.end


# ---- the environment ----

MIN_COLUMNS = 40  # tyro's help never ends below some twenty


def widen_terminal() -> None:
    """Lay out help for at least MIN_COLUMNS columns, whatever COLUMNS or the terminal says."""
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


LAUNCHER_MINIMUM = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside LOCAL_RANK


def check_launcher(environment: Mapping[str, str]) -> None:
    """Check the variables by which torchrun and accelerate tell processes of each other.

    Raises:
        UserError: one is no number, out of range, or missing beside LOCAL_RANK.
    """
    numbers = {}
    for name, minimum in LAUNCHER_MINIMUM.items():
        if name in environment:
            try:
                numbers[name] = int(environment[name])
            except ValueError:
                numbers[name] = minimum - 1
            if numbers[name] < minimum:
                given = environment[name]
                raise UserError(f"{name} must be a whole number of at least {minimum}, got '{given}'")
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE")
    if size is not None and rank >= size:
        raise UserError(f"RANK must be below WORLD_SIZE, which is {size}, got {rank}")
    missing = [name for name in NEEDED if name not in environment]
    if missing and numbers.get("LOCAL_RANK", -1) != -1:
        raise UserError(f"{' and '.join(missing)} must be set where LOCAL_RANK is; start several processes by torchrun "
                        "or accelerate launch, one without it")  # fmt: skip


def check_optimize_level(level: int) -> None:
    """Refuse a Python that drops all docstrings: transformers reads its own to import.

    Raises:
        UserError: the level of `python -O`, sys.flags.optimize, is above 1.
    """
    if level > 1:
        raise UserError(f"PYTHONOPTIMIZE (python -O) must be 0 or 1, got {level}; transformers does not import without "
                        "docstrings")  # fmt: skip
