"""Of several test processes one compiles, the others wait for it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """While this context is open no other process is in it for the same folder."""
    with open(folder / ".compiling", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
