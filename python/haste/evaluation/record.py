"""What was measured of a set of samples, kept beside it as JSON with everything that it depends on.

    <samples>-evaluation.json   one entry for each combination of pictures, network, reference and settings
    <samples>-features/         features of the pictures, by network

Nothing is lost by measuring again: an entry is replaced by one of the same pictures and settings alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haste.errors import UserError
from haste.evaluation.metrics import Result
from haste.io import read_json, told, write_json
from haste.lock import updating


def beside(samples: Path, ending: str) -> Path:
    """<samples>-<ending>: the same for a folder and for the .npz of its pictures."""
    samples = samples if samples.name not in ("", "..") else samples.resolve()
    name = samples.name if samples.is_dir() else samples.stem
    return samples.with_name(f"{name}-{ending}")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The entries of an evaluation.json, oldest first; none if there is no file. UserError if it is something else."""
    if not path.exists():
        return []
    entries = read_json(path, "the evaluations of samples", needs=["evaluations"])["evaluations"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "settings" in entry for entry in entries):
        raise UserError(f"{path} must be the evaluations of samples, a list of entries with settings; move it away")
    return entries


def keep_evaluation(path: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add an entry, in place of one with the same settings; the file is replaced whole, or stays as it was.

    Another command that does the same waits. UserError if it cannot be written.
    """
    settings = json.loads(json.dumps(settings))  # as it will be read: tuples become lists
    with told(str(path), "what was measured before is kept"), updating(path):
        others = [entry for entry in read_evaluations(path) if entry["settings"] != settings]
        write_json(path, {"evaluations": [*others, {"settings": settings, **measured}]}, indent=1)


def metrics_record(results: Sequence[Result]) -> dict[str, Any]:
    """Results by their keys: value, and spread and note where there are any."""
    return {
        result.key: {
            "value": result.value,
            **({"spread": result.spread} if result.spread is not None else {}),
            **({"note": result.note} if result.note else {}),
        }
        for result in results
    }
