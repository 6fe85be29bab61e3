"""What a command prints while it works must not end the work."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

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
            self._judge(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._judge(error)

    @staticmethod
    def _judge(error: OSError) -> None:
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
