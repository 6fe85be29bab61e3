"""The trained model behind a checkpoint, with the settings of its run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from haste.errors import UserError
from haste.models.sit import SiT
from haste.training.checkpoint import list_checkpoints, load_model
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """A trained model with the settings of its run and the checkpoint file that it came from."""

    model: SiT
    config: TrainConfig
    checkpoint: Path

    @property
    def run(self) -> Path:
        """The run's folder: the one above checkpoints/, or the checkpoint's own."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder

    @property
    def step(self) -> int | None:
        """The training step, which is the file's name; None for a file that was renamed."""
        return int(self.checkpoint.stem) if self.checkpoint.stem.isdigit() else None

    @property
    def label(self) -> str:
        """'digits, step 2,000', for titles."""
        return f"{self.config.exp_name}, " + (self.checkpoint.stem if self.step is None else f"step {self.step:,}")


def load_student(path: Path, ema: bool = True) -> Student:
    """The student of a checkpoint file, or of the newest whole checkpoint of a run's folder.

    Raises UserError if there is none, or if the file does not hold one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(file: Path) -> Student:
        model, config = load_model(file, ema=ema)
        return Student(model.to(device), config, file)

    if not path.is_dir():
        return load(path)
    candidates = run_checkpoints(path)
    for candidate in reversed(candidates):
        try:
            return load(candidate)
        except UserError as error:
            logger.warning("%s; looking for an earlier one", error)
    raise UserError(f"none of the {len(candidates)} checkpoints in {path / 'checkpoints'} is whole")


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first; UserError if there are none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} holds no checkpoints; give a checkpoint file or the folder of a run of haste train")
    return checkpoints
