"""Terminals that are too narrow for tables of flags, or cannot show every letter: `Fréchet` becomes `Frechet` there.

What a command prints while it works must not end the work.

What surrounds a command, held against what it must be: how Python was started, and the variables by which torchrun
and accelerate tell processes of each other.
"""

from __future__ import annotations

import codecs
import errno
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from haste.errors import UserError

PLAIN = {
    "→": "->", "←": "<-", "×": "x", "·": "*", "–": "-", "—": "-", "−": "-", "…": "...", "±": "+-", "≤": "<=", "≥": ">=",
    "≈": "~", "√": "sqrt", "Δ": "Delta", "τ": "tau", "λ": "lambda", "μ": "u", "µ": "u", "σ": "sigma", "‖": "||",
    "“": '"', "”": '"', "‘": "'", "’": "'", "─": "-", "│": "|", "█": "#", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip


NARROWEST = 40  # columns; help does not end below some twenty


def widen() -> None:
    """Let help be laid out for NARROWEST columns at least, whatever COLUMNS or the terminal says."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def accept_any_text() -> None:
    """Let standard output and standard error replace what their encoding lacks, in place of raising.

    Where one is closed, what is printed goes nowhere.
    """
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()
    codecs.register_error("haste.plain_letters", in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="haste.plain_letters")


def nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `codecs`: each letter without its accent, or as PLAIN has it, or a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or without_accent(letter) or "?" for letter in letters), error.end


def without_accent(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()


# A disk that is full, for now, under a redirected stream. That a reader has left does end a command.
PASSED_OVER = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Patient:
    """A text stream like the one it is given, except that what cannot be written now costs nothing but itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._measure_quality(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._measure_quality(error)

    @staticmethod
    def _measure_quality(error: OSError) -> None:
        if error.errno not in PASSED_OVER:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_stderr() -> Iterator[None]:
    """While this context is open progress bars and messages, which go to stderr, end no command."""
    stream = sys.stderr
    sys.stderr = Patient(stream)
    try:
        yield
    finally:
        sys.stderr = stream


LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # where there is a LOCAL_RANK


def check_processes(environment: Mapping[str, str]) -> None:
    """UserError for a variable that is no number, or out of its range, or missing beside LOCAL_RANK."""
    numbers = {name: number(environment, name) for name in LEAST if name in environment}
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE")
    if size is not None and rank >= size:
        raise UserError(f"RANK must be below WORLD_SIZE, which is {size}, got {rank}")
    if numbers.get("LOCAL_RANK", -1) == -1:  # one process
        return
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise UserError(f"LOCAL_RANK is set, and {' and '.join(missing)} must be too; "
                        "start several processes by torchrun or accelerate launch, one without it")  # fmt: skip


def check_docstrings(optimize: int) -> None:
    """UserError for Python that has dropped all docstrings: transformers reads its own to import."""
    if optimize > 1:
        raise UserError(f"PYTHONOPTIMIZE (python -O) must be 0 or 1, got {optimize}; transformers does not import "
                        "without docstrings")  # fmt: skip


def number(environment: Mapping[str, str], name: str) -> int:
    try:
        value = int(environment[name])
    except ValueError:
        value = None
    if value is None or value < LEAST[name]:
        raise UserError(f"{name} must be a whole number of at least {LEAST[name]}, got '{environment[name]}'")
    return value
