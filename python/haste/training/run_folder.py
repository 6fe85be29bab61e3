"""The folder of one run: <output_dir>/<exp_name>/{args.json, log.jsonl, checkpoints/}; its branches in branches.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line
from haste.io import read_json, remove_abandoned, remove_leftovers, require_space, write_json
from haste.lock import hold
from haste.training.backlog import Backlog
from haste.training.branches import RECORD, Branches, forget_after
from haste.training.config import TrainConfig
from haste.training.resolved import differing_settings


class RunFolder:
    """The folder of a run, new or begun; UserError if it holds a run with other settings. Nothing is written yet."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir).expanduser() / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self.branches = Branches(self.path)
        self._settings = self.path / "args.json"
        self._log = self.path / "log.jsonl"
        self._lines = Backlog(str(self._log))
        if self._settings.is_file():
            self.refuse_other(read_json(self._settings, "the settings of a run"), "holds a run")

    def hold(self) -> AbstractContextManager[None]:
        """While this context is open no other process trains here; UserError if one does."""
        return hold(self.path, f"--exp-name {self.config.exp_name} is being trained in {self.path}")

    def settle(self) -> None:
        """Finish what a kill has left half done, before anything is read. UserError if the folder cannot be written."""
        try:
            self.branches.settle()
        except OSError as error:
            raise self._unusable(error) from error

    def claim(self, checkpoint_size: int) -> None:
        """Make the folder this run's, once it is known that the run can start; begin the branch of --resume-step.

        UserError if it cannot be written, or has no room for a checkpoint of so many bytes.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.checkpoints, self.path / "previews"):
                remove_leftovers(folder)
            for path in (self._settings, self._log, self.path / RECORD):
                remove_abandoned(path, held=True)
            require_space(self.checkpoints, checkpoint_size)
            self.branches.begin(self.config.resume_step)
            write_json(self._settings, asdict(self.config))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the run folder {self.path} cannot be used: {error.strerror or in_one_line(error)}")

    def refuse_other(self, found: Mapping[str, Any], what: str) -> None:
        """UserError, naming the first differences, if the settings found here are not those of this run."""
        differences = differing_settings(found, self.config)
        if differences:
            shown = ", ".join(differences[:3]) + (" and others" if len(differences) > 3 else "")
            raise UserError(f"{self.path} {what} with other settings: {shown}; choose another --exp-name")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl. While the disk is full it waits in memory."""
        line = json.dumps(record) + "\n"
        self._lines.add(lambda: append(self._log, line))

    def close(self) -> None:
        """Write the lines that wait, if that can be done now."""
        self._lines.close()

    def forget_after(self, step: int) -> None:
        """Drop the log lines of steps after this one, which are about to be done again (and a line cut short)."""
        forget_after(self._log, step)


def append(path: Path, line: str) -> None:
    """Add a line to a file, whole or, where the disk is full, not at all."""
    data = line.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
