"""What a sweep knows already: one record per point, in a file that is replaced whole, so that a kill loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from haste.errors import UserError
from haste.io import told, write_text

Record = dict[str, Any]


class RecordBook:
    """The lines of a sweep.jsonl.

    A record is {"sweep": what its points share, "point": what tells it apart, and what was measured}. `sweep` holds
    the checkpoint's name and time, the settings that all points share, the number of pictures, the batch, what they
    were judged by and the machine: points are compared only where all of that is equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        lines = path.read_text().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._records[key(record["sweep"], record["point"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"line {number} of {path} is no record of haste sweep ({error})") from error

    def find(self, sweep: Record, point: Record) -> Record:
        """The record of a point; an empty one if nothing is known of it."""
        return self._records.get(key(sweep, point), {"sweep": sweep, "point": point})

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
