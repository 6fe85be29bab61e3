"""Reading a run's log.jsonl, whoever wrote it and whatever a kill has left of it.

A line is one JSON object: step, aligned, and numbers or null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from haste.errors import UserError
from haste.io import read_bytes
from haste.training.meter import with_present_names

LARGEST_STEP = 2**53  # above, floats leave steps out
LARGEST_VALUE = 1e30  # no loss that can be shown beside others


class Log(NamedTuple):
    """lines: in the order of their steps, the last of each step. damaged: how many others could not be read."""

    lines: list[dict[str, Any]]
    damaged: int


def read_log(path: Path) -> Log:
    """The lines of a log.jsonl, in today's names; none if there is no file. A last line cut short is no damage.

    Raises UserError if the file cannot be read.
    """
    records, damaged = read_lines(path)
    lines: dict[int, dict[str, Any]] = {}
    for record in records:
        if is_step(record.get("step")):
            lines[record["step"]] = _clean(record)
        else:
            damaged += 1
    return Log([lines[step] for step in sorted(lines)], damaged)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a .jsonl file, and how many of its other lines are something else, a cut last one excepted.

    Raises UserError if the file cannot be read.
    """
    if not os.path.lexists(path):
        return [], 0
    try:
        text = read_bytes(path).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    records, damaged = [], 0
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):  # a whole line ends in a newline, so something follows it
            damaged += 1
    return records, damaged


def alignment_end(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """The step after which a log knows no alignment any more; None if it never had one or never ended it."""
    aligned = [line["step"] for line in lines if line["aligned"]]
    return aligned[-1] if aligned and aligned[-1] < lines[-1]["step"] else None


def is_step(value: Any) -> bool:
    """Whether a value from a file can be a training step."""
    return type(value) is int and 0 <= value < LARGEST_STEP


def finite(value: Any) -> float | None:
    """A value from a file as a number that can be shown; None for anything else."""
    if type(value) not in (int, float) or not abs(value) < LARGEST_VALUE:  # NaN is not below anything
        return None
    return float(value)


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    record = with_present_names(record)
    numbers = {name: finite(value) for name, value in record.items() if name not in ("step", "aligned")}
    return {"step": record["step"], "aligned": record.get("aligned") is True, **numbers}
