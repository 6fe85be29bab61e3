"""One stage of gpu_check: what it runs, for how long, with which kernels, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu.runner import Run

PASSED, FAILED, CRASHED, LATE, NOT_RUN, LEFT_OUT, NOT_JUDGED = STATUSES = (
    "passed", "failed", "crashed", "out of time", "not run", "left out", "not judged",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A program with a time limit.

    command: of the run and the kernel groups that are still trusted; a group found wrong is left out of it.
    groups: those that it can run; without one left it does not run. requires: those that it cannot do without.
    output: the file in the run's scratch folder that the program writes. operation: what tests that name none are of.
    """

    name: str
    kind: str
    limit: float  # seconds
    command: Callable[[Run, Sequence[str]], list[str]]
    groups: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    output: str = ""
    operation: str | None = None
    tool: str = ""  # of compute-sanitizer
    environment: dict[str, str] = field(default_factory=dict)

    def output_path(self, run: Run) -> Path:
        return run.scratch / self.output


@dataclass
class Outcome:
    """counts: by operation, how many tests passed, failed, were skipped or lost. note: what else there is to say."""

    status: str
    seconds: float = 0.0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    note: str = ""
