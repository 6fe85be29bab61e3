"""evaluation.json beside samples: an entry for each combination of images, network, reference and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from haste.errors import UserError
from haste.io import read_json, write_json, writing
from haste.resumable import updating


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Read the entries of an evaluation.json, oldest first; none if there is no file. UserError for another file."""
    if not path.exists():
        return []
    entries = read_json(path, "the evaluations of samples", needs=["evaluations"])["evaluations"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "settings" in entry for entry in entries):
        raise UserError(f"{path} must be the evaluations of samples, a list of entries with settings; move it away")
    return entries


def keep_evaluation(path: Path, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add an entry, or replace one with the same settings, atomically and under a lock. UserError if that fails."""
    settings = json.loads(json.dumps(settings))  # as it is read back: tuples become lists
    with writing(str(path), "what was measured before is kept"), updating(path):
        others = [entry for entry in read_evaluations(path) if entry["settings"] != settings]
        write_json(path, {"evaluations": [*others, {"settings": settings, **measured}]}, indent=1)
