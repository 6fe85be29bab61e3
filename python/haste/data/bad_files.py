"""Files that cannot be used, and what becomes of them."""

from __future__ import annotations

from typing import Literal

OnBadFile = Literal["refuse", "skip"]


class BadFile(Exception):
    """One file that is missing, cut short or of the wrong kind. It travels from worker processes, so it pickles."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def refusal(fault: BadFile) -> str:
    """The sentence with which a command ends that may not skip."""
    return f"{fault}; replace it, or pass over such files with --on-bad-file skip"
