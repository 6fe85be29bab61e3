"""What a sweep knows already: one record per point, in a file that is replaced whole, so that a kill loses nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haste.io import parse_json, read_bytes, told, write_text
from haste.limits import LARGEST_JSON
from haste.plain import build

Record = dict[str, Any]


@dataclass
class _Kept:
    """Of a record in a file what is read whether the point is complete or not."""

    sweep: dict[str, Any]
    point: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)


class RecordBook:
    """The lines of a sweep.jsonl.

    A record is {"sweep": what its points share, "point": what tells it apart, and what was measured}. `sweep` holds
    the checkpoint's name and digest, the settings that all points share, the number of pictures, the batch, what they
    were judged by and the machine: points are compared only where all of that is equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        lines = read_bytes(path, LARGEST_JSON).splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            record = parse_json(line, f"line {number} of {path}", "a record of haste sweep", needs=("sweep", "point"))
            build(_Kept, record, f"line {number} of {path}")
            self._records[key(record["sweep"], record["point"])] = record

    def find(self, sweep: Record, point: Record) -> Record:
        """The record of a point; an empty one if nothing is known of it."""
        return self._records.get(key(sweep, point), {"sweep": sweep, "point": point})

    def rename(self, before: Record, sweep: Record) -> None:
        """Have the records of the sweep `before`, where there are none of `sweep` itself, be of that."""
        renamed = [record for record in self._records.values() if record["sweep"] == before]
        for record in renamed:
            del self._records[key(before, record["point"])]
            self._records.setdefault(key(sweep, record["point"]), {**record, "sweep": sweep})

    def keep(self, sweep: Record, point: Record, **measured: Any) -> None:
        """Add what was measured of a point to its record, on the disk as well."""
        self._records[key(sweep, point)] = {**self.find(sweep, point), **measured}
        text = "".join(json.dumps(record) + "\n" for record in self._records.values())
        with told(str(self.path), "what was measured before is kept, and the same command goes on"):
            write_text(self.path, text)

    def of(self, sweep: Record | None = None) -> list[Record]:
        """The complete records of one sweep, in the order in which they were begun; None: of the last in the file."""
        records = [record for record in self._records.values() if record.get("seconds")]
        if sweep is None:
            sweep = records[-1]["sweep"] if records else {}
        return [record for record in records if record["sweep"] == sweep]


def key(sweep: Record, point: Record) -> str:
    return json.dumps([sweep, point], sort_keys=True)
