"""What a run goes on from besides weights, held against what the trainer can take up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.plain import build, check, shown
from haste.training.interchange import Weights, is_empty, why_unusable
from haste.vae import LatentFormat

LATEST = 2**53  # steps

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Termination:
    stopped_at: int | None
    observed: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class _Scaler:
    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int = 0


@dataclass
class _Data:
    images: int | None = None
    names: str | None = None
    labels: str | None = None
    files: list[int | None] | None = None


def check_resumable(checkpoint: Mapping[str, Any], source: str) -> None:
    """UserError, naming `source` and the part, if training cannot go on from it.

    checkpoint: as `read_newest_checkpoint` completes it, with weights in our conventions.
    """
    steps = check(checkpoint["steps"], int, f"steps of {source}")
    if not 0 <= steps <= LATEST:
        raise UserError(f"steps of {source} must be a number of steps, and is {steps}")
    _check_optimizer(checkpoint["opt"], checkpoint["model"], f"opt of {source}")
    for name, kind in (("termination", _Termination), ("data", _Data)):
        if checkpoint.get(name) is not None:
            build(kind, checkpoint[name], f"{name} of {source}")
    if checkpoint.get("latents"):  # none where pixels are learned
        LatentFormat.from_dict(checkpoint["latents"], f"latents of {source}")
    if not is_empty(checkpoint.get("scaler")):  # one that is off keeps nothing
        build(_Scaler, checkpoint["scaler"], f"scaler of {source}")
    if checkpoint.get("rng") is not None:
        _check_rng(checkpoint["rng"], f"rng of {source}")


def _check_optimizer(opt: Any, weights: Weights, source: str) -> None:
    """AdamW's: for each parameter, counted as the weights are, a step and two moments of its shape, or nothing yet."""
    state = opt.get("state") if isinstance(opt, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{source} must be the state of AdamW, and is {shown(opt)}")
    for number, (name, weight) in enumerate(weights.items()):
        entry = state.get(number)
        if entry is None:
            continue
        moments = [entry.get(moment) for moment in MOMENTS] if isinstance(entry, Mapping) else [None]
        fit = all(isinstance(m, Tensor) and not why_unusable(m) and m.shape == weight.shape for m in moments)
        if not fit or not _is_count(entry.get("step")):
            raise UserError(f"{source} must hold a step and two moments of its shape for {name}, and does not")
        if not all(torch.isfinite(moment).all() for moment in moments):  # they would reach the weights in one step
            raise UserError(f"{source} must hold finite moments, and those for {name} are not")


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        return not why_unusable(step) and step.numel() == 1
    return type(step) in (int, float)


def _check_rng(state: Any, source: str) -> None:
    """Sets generators of their own to these states."""
    if not isinstance(state, Mapping):
        raise UserError(f"{source} must be the states of random generators, and is {shown(state)}")
    try:
        torch.Generator().set_state(state["torch"])
        cuda = state["cuda"]
        if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8 and cuda.numel() == 16):
            raise ValueError("its cuda is no state of a GPU's generator")
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        random.Random().setstate(state["python"])
    except Exception as error:  # the generators' own errors are of many kinds
        raise UserError(f"{source} must be the states of random generators: {in_one_line(error)}") from error
