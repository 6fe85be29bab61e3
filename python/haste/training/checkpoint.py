"""Checkpoints: written whole or not at all, read without executing anything.

A file holds what HASTE's and REPA's files hold (model, ema, opt, args, steps), laid out as there, and under keys of
their own what it takes to go on as if nothing had happened: model_config, rng, termination, scaler.
The position in the data needs no entry of its own: the order of the pictures is a function of the step.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.errors import UserError
from haste.io import write_atomically
from haste.models.sit import SiT
from haste.training.config import TrainConfig
from haste.training.interchange import Weights, infer_model_config, to_our_conventions

logger = logging.getLogger(__name__)

Checkpoint = dict[str, Any]

PUBLIC_KEYS = {"model", "ema", "opt", "args", "steps"}
RESUME_KEYS = ("model_config", "rng", "termination", "scaler")


class BrokenCheckpoint(Exception):
    """The file is no whole checkpoint."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def read_file(path: Path) -> Checkpoint:
    """Read on the CPU. Tensors, plain values and argparse.Namespace are admitted, and no other class.

    Raises BrokenCheckpoint for a file that is cut short, damaged, of another kind, or that asks for another class.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums that torch.save wrote
                raise BrokenCheckpoint(f"{path} is no whole checkpoint: it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise BrokenCheckpoint(f"{path} is no whole checkpoint") from error
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path} holds no checkpoint")
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """One to go on from, ours or the public trainers'; BrokenCheckpoint as in read_file, or if a part is missing."""
    checkpoint = read_file(path)
    if not checkpoint.keys() >= PUBLIC_KEYS:
        raise BrokenCheckpoint(f"{path} lacks model, ema, opt, args or steps")
    return checkpoint


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for path in list_checkpoints(folder)[:-keep] if keep else ():
        path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdigit())


def read_newest_checkpoint(folder: Path, step: int = 0) -> Checkpoint | None:
    """The checkpoint of `step`, or for 0 the newest whole one; None if there are no files.

    One that REPA or HASTE wrote is completed: it has no state of random generators, of a rule of termination or of a
    scaler, so those are None. A damaged newest file is passed over with a warning. UserError if the wanted file is
    missing or if none is whole.
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
        if "model_config" not in checkpoint:
            logger.info("%s is another trainer's; training goes on from its weights and its optimizer", path)
        return {**dict.fromkeys(RESUME_KEYS), **checkpoint, **both_weights(checkpoint)}
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} is whole; move them away to start again")
    return None


def capture_rng() -> dict[str, Any]:
    """The states of all random generators that training draws from, which are the same in every process."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of capture_rng, for the GPU of this process."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])


def both_weights(content: Checkpoint, args: Mapping[str, Any] | None = None) -> dict[str, Weights]:
    """model and ema of a file of this trainer, of HASTE's, REPA's or SiT's, in our conventions.

    A bare file of weights, and one that holds only averaged ones, gives these for both.
    args: the settings of its run; by default as the file has them.
    """
    args = settings_of(content) if args is None else args
    alone = content.get("ema") or content
    return {part: to_our_conventions(content.get(part) or alone, args) for part in ("model", "ema")}


def settings_of(content: Checkpoint) -> dict[str, Any]:
    """The settings of the run that wrote a file; empty if it does not hold them."""
    return vars(content["args"]) if "args" in content else {}


def read_student(path: Path, assume: Mapping[str, Any] | None = None) -> Checkpoint:
    """model, ema and model_config of a checkpoint of any of these trainers, and the settings of its run as `args`.

    Also `latents`, the format of its latents or None for pixels, if the file tells.
    assume: settings of the run for which the file has none.
    Raises UserError if the file is missing or holds no SiT.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist")
    try:
        content = read_file(path)
    except BrokenCheckpoint as error:
        raise UserError(str(error)) from error
    args = {**(assume or {}), **settings_of(content)}
    weights = both_weights(content, args)
    try:
        model_config = content.get("model_config") or infer_model_config(weights["model"], args)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    known = {"latents": content["latents"]} if "latents" in content else {}
    return {**weights, "model_config": model_config, "args": args, **known}


def load_model(path: str | Path, ema: bool = True) -> tuple[SiT, TrainConfig]:
    """The student of a checkpoint, in eval mode on the CPU and without its projectors, and the run's settings.

    ema: the averaged weights, which samples are drawn with, or the trained ones.
    Raises UserError if the file is missing or no checkpoint of this trainer, HASTE's, REPA's or SiT's.
    """
    student = read_student(Path(path))
    return build_model(student, ema), TrainConfig.from_dict(student["args"])


def build_model(student: Checkpoint, ema: bool = True, fused_attn: bool = True) -> SiT:
    """The model of what `read_student` returns, as `load_model` gives it."""
    config = {**student["model_config"], "attention": "sdpa", "fused_attn": fused_attn}  # sdpa is everywhere
    model = SiT(**config, z_dims=())
    weights = student["ema" if ema else "model"]
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("projectors.")})
    return model.eval()
