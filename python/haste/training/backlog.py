"""Writes that a running command can do without for a while, such as its log: a full disk costs no training."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Backlog:
    """Writes in their order. One that fails waits in memory, and so do those after it; all are tried again with the
    next. The first failure is reported, and when all are written.

    what: names what is written, for the messages. errors: what a write may raise.
    """

    def __init__(self, what: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError) -> None:
        self.what = what
        self.errors = errors
        self._waiting: deque[Callable[[], None]] = deque()
        self._failing = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, write: Callable[[], None]) -> None:
        """Write now, after all that wait; or keep it for later."""
        self._waiting.append(write)
        self.flush()

    def flush(self) -> None:
        """Try what waits."""
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
        except self.errors as error:
            if not self._failing:
                logger.error("%s cannot be written, and training goes on: %s; it is tried again", self.what, error)
            self._failing = True
            return
        if self._failing:
            logger.warning("%s is written again, with what was missing", self.what)
            self._failing = False

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        self.flush()
        if self._waiting:
            logger.error("%s lacks the last %d entries, which could not be written", self.what, len(self._waiting))
