"""Checkpoints: written whole or not at all, read without executing anything.

A file holds what HASTE's and REPA's files hold (model, ema, opt, args, steps), laid out as there, and under keys of
their own what it takes to go on as if nothing had happened: model_config, rng, termination, scaler.
The position in the data needs no entry of its own: the order of the pictures is a function of the step.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.errors import UserError
from haste.io import save_tensors
from haste.models.sit import SiT
from haste.plain import check
from haste.training.config import TrainConfig
from haste.training.conventions import Convention, our_settings, refuse_other_predictions
from haste.training.interchange import (
    both_weights,
    first_not_finite,
    infer_model_config,
    is_projector,
    read_parts,
    require_names,
    require_shapes,
)
from haste.training.model_config import checked, on_meta
from haste.training.recorded import is_ours
from haste.training.resumable import check_resumable
from haste.training.weight_files import BrokenCheckpoint, read_file, settings_in

logger = logging.getLogger(__name__)

Checkpoint = dict[str, Any]

PUBLIC_KEYS = ("model", "ema", "opt", "args", "steps")
SAMPLED_BY = ("exp_name", "data_dir", "model", "resolution", "num_classes", "encoder_depth", "path_type", "vae")
RESUME_KEYS = ("model_config", "rng", "termination", "scaler")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    save_tensors(path, checkpoint)


def read_checkpoint(path: Path) -> Checkpoint:
    """One to go on from, ours or the public trainers'.

    Raises BrokenCheckpoint for a damaged file, UserError for one that cannot be used or lacks a part.
    """
    checkpoint = read_file(path)
    refuse_other_predictions(settings_of(checkpoint, path), path)
    missing = [name for name in PUBLIC_KEYS if name not in checkpoint]
    if missing:
        raise UserError(
            f"{path} lacks {missing[0]}, so a run cannot go on from it; begin a new one with --init-from {path}"
        )
    return checkpoint


class Retention:
    """--keep: deletes the older whole checkpoints of a folder, each time that a newer one was written.

    Damaged files are neither counted nor deleted, and named once; a file is read for that once in a process, and only
    where it would be deleted or counted otherwise. keep: how many stay; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._whole: dict[Path, bool] = {}

    def written(self, newest: Path) -> None:
        """`newest` has been written whole: delete those before it that are too many."""
        self._whole[newest] = True
        older = [path for path in list_checkpoints(self.folder) if int(path.stem) < int(newest.stem)]
        if not self.keep or len(older) < self.keep:
            return
        for path in [path for path in reversed(older) if self._is_whole(path)][self.keep - 1 :]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be deleted, as --keep asks: %s", path, error.strerror)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            self._whole[path] = is_whole(path)
            if not self._whole[path]:
                logger.warning("%s is damaged; --keep neither counts nor deletes it", path)
        return self._whole[path]


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as torch.save wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive leads zipfile to raise anything
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdecimal())


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
        return completed(checkpoint, path)
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


def completed(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """A checkpoint to go on from with all of its parts, each held against what it must be; UserError if it is not."""
    args = settings_of(checkpoint, path)
    TrainConfig.from_dict(args, f"args of {path}")  # refuses settings of another type, which could not be compared
    weights, _ = both_weights(checkpoint, args, path)
    whole = {**dict.fromkeys(RESUME_KEYS), **checkpoint, **weights, "args": argparse.Namespace(**args)}
    check_resumable(whole, str(path))
    return whole


def settings_of(content: Checkpoint, path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a file; empty if it does not hold them. UserError for what are none.

    Another trainer's None stands for what was not said.
    """
    settings = settings_in(content.get("args"), f"args of {path}")
    return {name: value for name, value in settings.items() if is_ours(settings) or value is not None}


def read_student(
    path: Path, assume: Mapping[str, Any] | None = None, convention: Convention | None = None
) -> Checkpoint:
    """model, ema and model_config of a checkpoint of any of these trainers, and the settings of its run as `args`.

    Also `convention`, whose it keeps, and `latents`, the format of its latents or None for pixels, and
    `class_names`, by label, if the file tells.
    assume: settings of the run for which the file has none. convention: whose it keeps, where the file does not tell.
    Raises UserError if the file is missing, holds no SiT, or does not tell whose and nothing is given; of these
    BrokenCheckpoint if it is damaged.
    """
    if not path.is_file():
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"the checkpoint {path} {what}")
    content = read_file(path)
    own = settings_of(content, path)
    args = {**(assume or {}), **own}
    parts = read_parts(content, path)
    try:
        given = content.get("model_config")
        model_config = checked(infer_model_config(parts["model"], args) if given is None else given, str(path))
        model = on_meta(model_config)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    for part, values in parts.items():
        require_names(model, values, f"{part} of {path}")
    weights, found = both_weights(content, own, path, convention)
    for part, values in weights.items():
        require_shapes(model, values, f"{part} of {path}")
        broken = first_not_finite(values)
        if broken is not None:
            logger.warning("%s of %s holds numbers that are not finite, in %s for one", part, path, broken)
    known = {"latents": content["latents"]} if "latents" in content else {}
    if content.get("class_names") is not None:
        known["class_names"] = check(content["class_names"], list[str], f"class_names of {path}")
    return {**weights, "model_config": model_config, "args": our_settings(args, found), "convention": found, **known}


def load_model(path: str | Path, ema: bool = True, convention: Convention | None = None) -> tuple[SiT, TrainConfig]:
    """The student of a checkpoint, in eval mode on the CPU and without its projectors, and the run's settings.

    ema: the averaged weights, which samples are drawn with, or the trained ones.
    convention: whose the file keeps, where it does not tell: "repa" or "sit".
    Raises UserError if the file is missing or no checkpoint of this trainer, HASTE's, REPA's or SiT's.
    """
    student = read_student(Path(path), convention=convention)
    return build_model(student, ema), sampling_config(student, path)


def sampling_config(student: Checkpoint, path: str | Path) -> TrainConfig:
    """The settings of the run of what `read_student` returns; of another trainer's those alone by which it is sampled.

    So another trainer's file may hold anything where only training would look.
    """
    args = student["args"]
    read = args if is_ours(args) else {name: args[name] for name in SAMPLED_BY if name in args}
    return TrainConfig.from_dict(read, f"args of {path}")


def build_model(student: Checkpoint, ema: bool = True, fused_attn: bool = True) -> SiT:
    """The model of what `read_student` returns, as `load_model` gives it."""
    config = {**student["model_config"], "attention": "sdpa", "fused_attn": fused_attn}  # sdpa is everywhere
    model = on_meta(config)
    weights = student["ema" if ema else "model"]
    weights = {name: value.float().contiguous() for name, value in weights.items() if not is_projector(name)}
    model.load_state_dict(weights, assign=True)
    return model.eval()
