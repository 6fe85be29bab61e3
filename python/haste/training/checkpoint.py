"""Checkpoints: written whole or not at all, read without executing anything.

A file holds what HASTE's and REPA's files hold (model, ema, opt, args, steps) and, under keys of their own, what it
takes to go on as if nothing had happened: model_config, rng, termination, scaler.
The position in the data needs no entry of its own: the order of the pictures is a function of the step.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.errors import UserError
from haste.models.sit import SiT
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)

Checkpoint = dict[str, Any]

PUBLIC_KEYS = {"model", "ema", "opt", "args", "steps"}
RESUME_KEYS = {"model_config", "rng", "termination", "scaler"}


class BrokenCheckpoint(Exception):
    """The file is no whole checkpoint."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def write_atomically(path: Path, write: Any) -> None:
    """Call write(temporary path), push it to the disk, then give it its name: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk as well
    finally:
        os.close(folder)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read on the CPU. Tensors, plain values and argparse.Namespace are admitted, and no other class.

    Raises BrokenCheckpoint for a file that is cut short, damaged, of another kind, or that asks for another class.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums that torch.save wrote
                raise BrokenCheckpoint(f"{path} is no whole checkpoint: it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise BrokenCheckpoint(f"{path} is no whole checkpoint") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= PUBLIC_KEYS:
        raise BrokenCheckpoint(f"{path} lacks model, ema, opt, args or steps")
    return checkpoint


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of a write has left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdigit())


def read_newest_checkpoint(folder: Path, step: int = 0) -> Checkpoint | None:
    """The checkpoint of `step`, or for 0 the newest whole one; None if there are no files.

    A damaged newest file is passed over with a warning. UserError if the wanted file is missing, if none is whole, or
    if it comes from a trainer that leaves out what going on takes.
    """
    paths = list_checkpoints(folder)
    if step:
        paths = [path for path in paths if int(path.stem) == step]
        if not paths:
            raise UserError(f"--resume-step is {step}, and {checkpoint_path(folder, step)} does not exist")
    for path in reversed(paths):
        try:
            checkpoint = read_checkpoint(path)
        except BrokenCheckpoint as error:
            logger.warning("%s; looking for an earlier one", error)
            continue
        if not checkpoint.keys() >= RESUME_KEYS:
            missing = ", ".join(sorted(RESUME_KEYS - checkpoint.keys()))
            raise UserError(f"{path} was not written by haste train: it holds no {missing}")
        return checkpoint
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} is whole; move them away to start again")
    return None


def capture_rng() -> dict[str, Any]:
    """The states of all random generators that training draws from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of capture_rng. GPU states are restored on as many GPUs as there are."""
    torch.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])


def load_model(path: str | Path, ema: bool = True) -> tuple[SiT, TrainConfig]:
    """The student of a checkpoint, in eval mode on the CPU and without its projectors, and the run's settings.

    ema: the averaged weights, which samples are drawn with, or the trained ones.
    Raises UserError if the file is missing or no whole checkpoint of this trainer.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist")
    try:
        checkpoint = read_checkpoint(path)
    except BrokenCheckpoint as error:
        raise UserError(str(error)) from error
    if "model_config" not in checkpoint:
        raise UserError(f"{path} was not written by haste train: it holds no model_config")
    model = SiT(**checkpoint["model_config"], z_dims=())
    weights = checkpoint["ema" if ema else "model"]
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("projectors.")})
    return model.eval(), TrainConfig.from_dict(vars(checkpoint["args"]))
