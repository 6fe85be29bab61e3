"""What a stage has found, one JSON line per test as it ends: whatever kills the stage, these lines stay.

Programs write {"planned": [names]}, then {"name", "result": "started"} and {"name", "result": "passed", "failed" or
"skipped", ...} to the file that gpu_check names in the environment; without one they write nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

FILE, STAGE = "GPU_CHECK_RECORDS", "GPU_CHECK_STAGE"
ENDS = ("passed", "failed", "skipped")
OPERATIONS = ("attn_align_loss", "token_cosine_loss", "taylor_extrapolate")


def write(**record: object) -> None:
    """One line, written at once and whole."""
    if path := os.environ.get(FILE):
        line = json.dumps({"stage": os.environ.get(STAGE, ""), **record}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


@dataclass
class Tally:
    """The records of one stage: `results` by name, and what was planned or begun and has no result."""

    results: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    running: str | None = None  # the last that began and did not end

    def counts(self, default: str | None = None) -> dict[str, dict[str, int]]:
        """By operation, which a name contains; what names none counts for `default`."""
        counts: dict[str, dict[str, int]] = {}
        for name, result in [*self.results.items(), *((name, "lost") for name in self.lost)]:
            if operation := operation_of(name) or default:
                own = counts.setdefault(operation, dict.fromkeys((*ENDS, "lost"), 0))
                own[result] += 1
        return counts


def operation_of(name: str) -> str | None:
    """taylor_extrapolate stands for all of its forms, which share a kernel's source."""
    return next((operation for operation in OPERATIONS if operation in name), None)


def tally(path: Path, stage: str) -> Tally:
    """Of what is whole in the file: a kill can leave half a line."""
    found, begun = Tally(), {}
    for record in read(path):
        if record.get("stage") != stage:
            continue
        begun |= dict.fromkeys(record.get("planned", ()))
        name, result = record.get("name"), record.get("result")
        if result == "started":
            begun[name] = found.running = None
            found.running = name
        elif result in ENDS:
            worse = "failed" in (found.results.get(name), result)
            found.results[name] = "failed" if worse else result
            found.running = None if found.running == name else found.running
    found.lost = [name for name in begun if name not in found.results]
    return found


def read(path: Path) -> Iterable[Mapping]:
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
