"""The folder of a run, and its branches.

    <output_dir>/<exp_name>/
        args.json, config.yaml       its settings: for REPA's tools, and as --config takes them
        log.jsonl, evaluation.jsonl  a line for each step that was logged or evaluated
        checkpoints/, samples/       entries begin with their step, in seven digits
        branch.json                  the step from which --resume-step began the present branch
        branches/1-from-0000004/     the one before: a run's folder like any other, with the entries of the steps after
                                     4 and all lines

--resume-step begins a branch; nothing is deleted. A kill in the middle of the move leaves every file in one of the two
folders, and the next start moves the rest before it does anything else.
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
from haste.training.settings import differing_settings, write_config
from haste.validation import build

logger = logging.getLogger(__name__)

BRANCH, BRANCHES = "branch.json", "branches"
LOGS = ("log.jsonl", "evaluation.jsonl")  # each line has its step
SAMPLES = "samples"
FOLDERS = ("checkpoints", SAMPLES)


class RunDir(ResumableDir):
    """The folder of a run, new or begun; UserError if it holds a run with other settings. Nothing is written yet."""

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

    def may_begin(self) -> bool:
        return True  # HASTE's and REPA's runs have no record of ours

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        return differing_settings(saved, self.config)

    def hold(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """While this context is open no other process trains here; UserError if one does."""
        return hold(self.path, f"--exp-name {self.config.exp_name} is being trained in {self.path}")

    def settle(self) -> None:
        """Finish what a kill has left half done, before anything is read. UserError if the folder cannot be written."""
        try:
            self.branches.settle()
        except OSError as error:
            raise self._unusable(error) from error

    def create(self, checkpoint_size: int) -> None:
        """Make the folder, once it is known that the run can start; begin the branch of --resume-step.

        UserError if it cannot be written, or has no room for a checkpoint of so many bytes.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoints)
            for half_written in (self.path / SAMPLES).glob(".???????.png.*.tmp"):  # where haste sample may be at work
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
        """Append one line to log.jsonl. While the disk is full it waits in memory."""
        self._lines.add(lambda: append_line(self._log, record))

    def close(self) -> None:
        """Write the lines that wait, if that can be done now."""
        self._lines.close()

    def truncate_log(self, step: int) -> None:
        """Drop the log lines of steps after this one, which are about to be done again (and a line cut short)."""
        truncate_log(self._log, step)


@dataclass(frozen=True)
class Branch:
    """resumed_from: the step it began from; 0 for the first. aside: where the old one went, in the run's folder; empty
    if it had no later steps. moved: whether all of it is there."""

    resumed_from: int = 0
    aside: str = ""
    moved: bool = True


class Branches:
    """run: the run's folder."""

    def __init__(self, run: Path) -> None:
        self.run = run

    @property
    def running(self) -> Branch:
        """The one that the folder holds. UserError if its record is none."""
        path = self.run / BRANCH
        return build(Branch, read_json(path, "the record of a branch"), str(path)) if path.exists() else Branch()

    def step_to_read(self, resume_step: int) -> int:
        """The step of the checkpoint to resume from; 0 for the newest, also where --resume-step began this branch."""
        if resume_step and self.running.resumed_from == resume_step:
            logger.info("--resume-step %d began this branch of the run, which is resumed", resume_step)
            return 0
        return resume_step

    def begin(self, resume_step: int) -> None:
        """Begin a branch from this step, if --resume-step names another one than before. Raises OSError."""
        if not resume_step or self.running.resumed_from == resume_step:
            return
        aside = ""
        if any(self._later(resume_step)) or any(_later_lines(self.run / name, resume_step) for name in LOGS):
            number = 1 + max((_number(folder) for folder in (self.run / BRANCHES).glob("*-from-*")), default=0)
            aside = f"{BRANCHES}/{number}-from-{resume_step:07d}"
            logger.info("--resume-step %d begins a branch; the later steps move to %s", resume_step, self.run / aside)
        self._write(Branch(resume_step, aside, moved=not aside))
        self.settle()

    def settle(self) -> None:
        """Finish a move that was begun. Raises OSError."""
        branch = self.running
        if branch.moved:
            return
        aside = self.run / branch.aside
        aside.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "config.yaml", *LOGS):  # before a line is cut from them
            if (self.run / name).is_file() and not (aside / name).exists():
                write_text(aside / name, (self.run / name).read_text(errors="replace"))
        for path in list(self._later(branch.resumed_from)):
            target = aside / path.parent.name / path.name
            target.parent.mkdir(exist_ok=True)
            move(path, target)
        for name in LOGS:
            with updating(self.run / name):  # haste evaluate may be at work
                truncate_log(self.run / name, branch.resumed_from)
        self._write(replace(branch, moved=True))

    def _later(self, step: int) -> Iterator[Path]:
        """What the steps after this one have left."""
        for folder in FOLDERS:
            for path in sorted((self.run / folder).glob("[0-9]*")):
                digits = re.match(r"\d{7,}(?=[-.])", path.name)
                if digits and int(digits[0]) > step:
                    yield path

    def _write(self, branch: Branch) -> None:
        write_json(self.run / BRANCH, asdict(branch))


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of a log whose step is after this one, or that are cut short."""
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:
        write_text(path, kept)


def move(path: Path, target: Path) -> None:
    """Rename a file or a folder; to another disk, which a link may lead to, copy it whole before it is deleted."""
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = temporary_path(target)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary)
        os.rename(temporary, target)
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


def _later_lines(path: Path, step: int) -> bool:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return any(step < _step_of(line) < math.inf for line in lines)


def _step_of(line: str) -> float:
    """Of a line of a log; infinite if it is no such line. The score of a renamed checkpoint belongs to no step."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return -1 if step is None else step if isinstance(step, (int, float)) else math.inf


def _number(folder: Path) -> int:
    head = folder.name.split("-", 1)[0]
    return int(head) if head.isdigit() else 0


# ---- --checkpoints-total-limit ----


class Retention:
    """--checkpoints-total-limit: delete the older whole checkpoints of a folder whenever a newer one was written.

    Damaged files are neither counted nor deleted, and named once; a file is read for that once in a process, and only
    where it would be deleted or counted otherwise. limit: how many stay; 0 keeps all.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._whole: dict[Path, bool] = {}

    def written(self, newest: Path) -> None:
        """`newest` has been written whole: delete those before it that are too many."""
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
        if path not in self._whole:
            self._whole[path] = is_whole(path)
            if not self._whole[path]:
                logger.warning("%s is damaged; --checkpoints-total-limit neither counts nor deletes it", path)
        return self._whole[path]


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as torch.save wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive leads zipfile to raise anything
        return False
