"""The folder of a run, and its branches.

    <output_dir>/<exp_name>/
        args.json, config.yaml       the settings: for REPA's tools, and as a --config file
        log.jsonl, evaluation.jsonl  one line per logged or evaluated step
        checkpoints/, samples/       names begin with the step, in seven digits
        branch.json                  the step at which --resume-step began the current branch
        branches/1-from-0000004/     an earlier branch: a run's folder with the files of the steps after 4 and all lines

--resume-step begins a branch and deletes nothing. If the process is killed while files are moved, each file is in one
of the two folders, and the next start moves the rest first.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line
from haste.io import (
    read_json,
    remove_abandoned,
    remove_leftovers,
    require_space,
    temporary_path,
    write_json,
    write_text,
)
from haste.resumable import ResumableDir, append_line, hold, updating
from haste.training.checkpoint import list_checkpoints
from haste.training.config import TrainConfig
from haste.training.logging import Backlog
from haste.training.settings import differing_settings, has_begun, write_config
from haste.validation import build

logger = logging.getLogger(__name__)

BRANCH, BRANCHES = "branch.json", "branches"
LOGS = ("log.jsonl", "evaluation.jsonl")  # each line has its step
SAMPLES = "samples"
FOLDERS = ("checkpoints", SAMPLES)


class RunDir(ResumableDir):
    """The folder of a new or existing run. Opening it writes nothing.

    Raises:
        UserError: it holds a run with other settings.
    """

    flag = "--exp-name"
    content = "a run"
    record_name = "args.json"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        super().__init__(Path(config.output_dir).expanduser() / config.exp_name, asdict(config))
        self.checkpoints = self.path / "checkpoints"
        self.branches = Branches(self.path)
        self._log = self.path / "log.jsonl"
        self._lines = Backlog(str(self._log))

    def reopen(self) -> None:
        if has_begun(self.path):
            super().reopen()

    def may_begin(self) -> bool:
        return True  # runs of HASTE and REPA have no args.json of haste

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        return differing_settings(saved, self.config)

    def hold(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Keep other processes from training here. UserError if one does."""
        return hold(
            self.path, f"--exp-name {self.config.exp_name} is being trained in {self.path}", flag="--output-dir"
        )

    def settle(self) -> None:
        """Finish a move of files that was interrupted. UserError if the folder cannot be written."""
        try:
            self.branches.settle()
        except OSError as error:
            raise self._unusable(error) from error

    def create(self, checkpoint_size: int) -> None:
        """Make the folder, and begin the branch of --resume-step.

        Args:
            checkpoint_size: in bytes.

        Raises:
            UserError: it cannot be written, or has no space for a checkpoint.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoints)
            for half_written in (self.path / SAMPLES).glob(".???????.png.*.tmp"):  # haste sample may write others
                half_written.unlink(missing_ok=True)
            config = self.path / "config.yaml"
            for path in (self.record, config, self._log, self.path / BRANCH):
                remove_abandoned(path, held=True)
            require_space(self.checkpoints, checkpoint_size)
            self.branches.begin(self.config.resume_step)
            write_json(self.record, asdict(self.config))
            write_config(config, self.config)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the run folder {self.path} cannot be used: {error.strerror or in_one_line(error)}")

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to log.jsonl. While the disk is full it waits in memory."""
        self._lines.add(lambda: append_line(self._log, record))

    def close(self) -> None:
        """Try to write the lines that wait."""
        self._lines.close()

    def truncate_log(self, step: int) -> None:
        """Drop the log lines of later steps, which are about to be trained again, and an incomplete last line."""
        truncate_log(self._log, step)


# ---- branches ----


@dataclass(frozen=True)
class Branch:
    """The content of branch.json.

    resumed_from: step at which the branch began; 0 for the first one.
    aside: folder of the earlier branch, inside the run's; empty if it had no later steps.
    moved: whether all its files are there.
    """

    resumed_from: int = 0
    aside: str = ""
    moved: bool = True


class Branches:
    """The branches of the run in a folder."""

    def __init__(self, run: Path) -> None:
        self.run = run

    @property
    def running(self) -> Branch:
        """The current branch. UserError if branch.json cannot be read."""
        path = self.run / BRANCH
        return build(Branch, read_json(path, "the record of a branch"), str(path)) if path.exists() else Branch()

    def step_to_read(self, resume_step: int) -> int:
        """The step of the checkpoint to resume from; 0 for the newest one, also if --resume-step began this branch."""
        if resume_step and self.running.resumed_from == resume_step:
            logger.info("resuming the branch of the run that --resume-step %d began", resume_step)
            return 0
        return resume_step

    def begin(self, resume_step: int) -> None:
        """Begin a branch at this step, unless it is 0 or began the current one. Raises OSError."""
        if not resume_step or self.running.resumed_from == resume_step:
            return
        aside = ""
        if any(self._later(resume_step)) or any(_has_later_lines(self.run / name, resume_step) for name in LOGS):
            taken = [folder.name.split("-")[0] for folder in (self.run / BRANCHES).glob("*-from-*")]
            number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
            aside = f"{BRANCHES}/{number}-from-{resume_step:07d}"
            logger.info("--resume-step %d begins a branch; later steps move to %s", resume_step, self.run / aside)
        self._write(Branch(resume_step, aside, moved=not aside))
        self.settle()

    def settle(self) -> None:
        """Finish a move of files. Raises OSError."""
        branch = self.running
        if branch.moved:
            return
        aside = self.run / branch.aside
        aside.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "config.yaml", *LOGS):  # before lines are dropped from the logs
            if (self.run / name).is_file() and not (aside / name).exists():
                write_text(aside / name, (self.run / name).read_text(errors="replace"))
        for path in list(self._later(branch.resumed_from)):
            target = aside / path.parent.name / path.name
            target.parent.mkdir(exist_ok=True)
            move(path, target)
        for name in LOGS:
            with updating(self.run / name):  # haste evaluate may write it
                truncate_log(self.run / name, branch.resumed_from)
        self._write(replace(branch, moved=True))

    def _later(self, step: int) -> Iterator[Path]:
        """The checkpoints and samples of later steps."""
        for folder in FOLDERS:
            for path in sorted((self.run / folder).glob("[0-9]*")):
                digits = re.match(r"\d{7,}(?=[-.])", path.name)
                if digits and int(digits[0]) > step:
                    yield path

    def _write(self, branch: Branch) -> None:
        write_json(self.run / BRANCH, asdict(branch))


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of a log that are of later steps or incomplete."""
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:
        write_text(path, kept)


def _has_later_lines(path: Path, step: int) -> bool:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return any(step < _step_of(line) < math.inf for line in lines)


def _step_of(line: str) -> float:
    """The step of a log's line; infinite for an incomplete one, -1 for the score of a renamed checkpoint."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return -1 if step is None else step if isinstance(step, (int, float)) else math.inf


def move(path: Path, target: Path) -> None:
    """Rename a file or a folder. To another disk it is copied first and then deleted."""
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = temporary_path(target)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary)
        os.rename(temporary, target)
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


# ---- --checkpoints-total-limit ----


class Retention:
    """Deletes old checkpoints when a new one has been written. Damaged files are neither counted nor deleted.

    Args:
        limit: how many stay; 0 keeps all.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._whole: dict[Path, bool] = {}  # each file is read once

    def written(self, newest: Path) -> None:
        """Delete the checkpoints before `newest`, which has been written, that exceed the limit."""
        self._whole[newest] = True
        older = [path for path in list_checkpoints(self.folder) if int(path.stem) < int(newest.stem)]
        if not self.limit or len(older) < self.limit:
            return
        for path in [path for path in reversed(older) if self._is_whole(path)][self.limit - 1 :]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be deleted, as --checkpoints-total-limit asks: %s", path, error.strerror)

    def _is_whole(self, path: Path) -> bool:
        """Whether every byte of a checkpoint is as torch.save wrote it."""
        if path not in self._whole:
            try:
                with zipfile.ZipFile(path) as archive:
                    self._whole[path] = archive.testzip() is None
            except Exception:  # zipfile raises anything for a damaged archive
                self._whole[path] = False
            if not self._whole[path]:
                logger.warning("%s is damaged; --checkpoints-total-limit neither counts nor deletes it", path)
        return self._whole[path]
