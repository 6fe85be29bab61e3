"""The folder of one run: <output_dir>/<exp_name>/{args.json, log.jsonl, checkpoints/}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line
from haste.io import remove_leftovers, require_space, write_text
from haste.training.config import TrainConfig
from haste.training.resolved import differing_settings


class RunFolder:
    """The folder of a run, new or begun; UserError if it holds a run with other settings. Nothing is written yet."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir).expanduser() / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self._settings = self.path / "args.json"
        self._log = self.path / "log.jsonl"
        if self._settings.is_file():
            self.refuse_other(self._read_settings(), "holds a run")

    def claim(self, checkpoint_size: int) -> None:
        """Make the folder this run's, once it is known that the run can start.

        UserError if it cannot be written, or has no room for a checkpoint of so many bytes.
        """
        text = json.dumps(asdict(self.config), indent=2) + "\n"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self._settings, text)
            remove_leftovers(self.checkpoints)
            require_space(self.checkpoints, checkpoint_size)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {error.strerror or error}") from error

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self._settings.read_text())
        except ValueError as error:
            raise UserError(f"{self._settings} does not hold the settings of a run: {in_one_line(error)}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{self._settings} does not hold the settings of a run, but {type(settings).__name__}")
        return settings

    def refuse_other(self, found: Mapping[str, Any], what: str) -> None:
        """UserError, naming the first differences, if the settings found here are not those of this run."""
        differences = differing_settings(found, self.config)
        if differences:
            shown = ", ".join(differences[:3]) + (" and others" if len(differences) > 3 else "")
            raise UserError(f"{self.path} {what} with other settings: {shown}; choose another --exp-name")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with open(self._log, "a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the log lines of steps after this one, which are about to be done again (and a line cut short)."""
        if not self._log.is_file():
            return
        kept = [line for line in self._log.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        write_text(self._log, text)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
