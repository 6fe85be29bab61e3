"""The progress bars of all commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

RARELY = 10.0  # seconds between two lines of a bar in a file or a pipe, where each stays


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on standard error; where that is no terminal, it is printed at most every RARELY seconds.

    Set its postfix with refresh=False, which would print it at once.

    Args:
        iterable: what the bar goes along with, or None for one that is moved by `update`.
        options: tqdm's own, such as total, desc and unit.
    """
    from tqdm import tqdm

    if not watched():
        options["mininterval"] = options["maxinterval"] = RARELY
    return tqdm(iterable, **options)


def watched() -> bool:
    """Whether standard error is a terminal; not if it is closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
