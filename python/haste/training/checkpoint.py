"""Checkpoints: written whole or not at all, read without executing anything, by one reader.

A file holds what HASTE's and REPA's files hold (model, ema, opt, args, steps), laid out as there, and under keys of
their own what it takes to resume as if nothing had happened: model_config, rng, termination, scaler.
The position in the data needs no entry of its own: the order of the images is a function of the step.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haste.errors import UserError, in_one_line
from haste.models import Convention, Weights, build_model, check_config, families, get_family, infer_config
from haste.training.config import TrainConfig
from haste.training.settings import is_ours
from haste.vae import LatentFormat
from haste.validation import build, check, shown
from haste.weights import BrokenCheckpoint, read_file, settings_in

logger = logging.getLogger(__name__)

Checkpoint = dict[str, Any]
"""What `read_checkpoint` returns."""

RESUMED = ("opt", "args", "steps")
SAMPLED_BY = ("exp_name", "data_dir", "model", "resolution", "num_classes", "encoder_depth", "path_type", "vae")


def read_checkpoint(
    path: Path, assume: Mapping[str, Any] | None = None, convention: Convention | None = None
) -> Checkpoint:
    """Read a checkpoint of this trainer, HASTE's, REPA's or SiT's, or a bare file of weights.

    Args:
        assume: settings of the run, for those that the file does not hold.
        convention: whose it keeps, where the file does not tell.

    Returns:
        model and ema, in our conventions and under our names; model_config; `args`, the settings of the run, as a
        dictionary; `convention`, whose the file kept; and what else the file holds, unchecked: see `check_resumable`.

    Raises:
        BrokenCheckpoint: a damaged or missing file.
        UserError: a file that cannot be used, or does not tell whose it is.
    """
    content = read_file(path)
    own = settings_of(content, path)
    if content.get("model_config") is None:
        for family in families():
            family.foreign.check_settings(own, path)
    args = {**(assume or {}), **own}
    parts = read_parts(content, path)
    try:
        given = content.get("model_config")
        model_config = check_config(infer_config(parts["model"], args) if given is None else given, str(path))
        model, foreign = on_meta(model_config), get_family(model_config).foreign
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    for part, values in parts.items():
        parts[part] = foreign.rename(values)
        require_names(model, parts[part], f"{part} of {path}")
    found = foreign.find_convention(content, parts["model"], own, path, convention)
    for part, values in parts.items():
        parts[part] = values = foreign.convert_weights(values, found)
        require_shapes(model, values, f"{part} of {path}")
        broken = first_not_finite(values)
        if broken is not None:
            logger.warning("%s of %s holds numbers that are not finite, in %s for one", part, path, broken)
    if content.get("class_names") is not None:
        check(content["class_names"], list[str], f"class_names of {path}")
    is_file_of_weights = not any(name in content for name in ("model", "ema"))
    others = {} if is_file_of_weights else content
    return {
        **others,
        **parts,
        "model_config": model_config,
        "args": foreign.convert_settings(args, found),
        "convention": found,
    }


def settings_of(content: Checkpoint, path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a file; empty if it does not hold them. UserError for what are none.

    Another trainer's None stands for what was not given.
    """
    settings = settings_in(content.get("args"), f"args of {path}")
    return {name: value for name, value in settings.items() if is_ours(settings) or value is not None}


def loaded_model(checkpoint: Checkpoint, ema: bool = True, fused_attn: bool = True) -> nn.Module:
    """The model of what `read_checkpoint` returns, in eval mode on the CPU and without its projectors.

    Args:
        ema: the EMA weights, which images are sampled with, or the trained ones.
    """
    config = checkpoint["model_config"]
    config = get_family(config).for_sampling(config, fused_attn)
    model = on_meta(config)
    weights = checkpoint["ema" if ema else "model"]
    weights = {name: value.float().contiguous() for name, value in weights.items() if not is_projector(name)}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def on_meta(model_config: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights. UserError for sizes that do not fit together."""
    with torch.device("meta"):
        return build_model(model_config)


def sampling_config(checkpoint: Checkpoint, path: str | Path) -> TrainConfig:
    """The settings of the run; of another trainer's those alone by which it is sampled.

    So another trainer's file may hold anything where only training would look.
    """
    args = checkpoint["args"]
    read = args if is_ours(args) else {name: args[name] for name in SAMPLED_BY if name in args}
    return build(TrainConfig, read, f"args of {path}")


# ---- weights of any trainer ----

# What torch.compile, DDP, FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_parts(content: Mapping[str, Any], file: Path) -> dict[str, Weights]:
    """model and ema as a file has them.

    A bare file of weights, and one that holds only averaged ones, gives these for both.
    Raises UserError for a file that holds no weights.
    """
    held = {part: content[part] for part in ("model", "ema") if not is_empty(content.get(part))}
    parts = {part: dense_weights(values, f"{part} of {file}") for part, values in held.items()}
    if not parts:
        parts["model"] = dense_weights(content.get("state_dict", content), str(file))
    return {part: parts.get(part, next(iter(parts.values()))) for part in ("model", "ema")}


def is_empty(value: Any) -> bool:
    """Whether a part of a file is not there, for all that it holds: None, or a dictionary of nothing."""
    return value is None or (isinstance(value, Mapping) and not value)


def dense_weights(values: Any, source: str) -> Weights:
    """The tensors of a state_dict under the names that they have in the model itself.

    source: names the file and the part of it.
    Raises UserError for anything else than dense tensors of floating-point numbers that are all in the file.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{source} must hold weights by their names, and is {shown(values)}")
    weights: Weights = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source} must hold weights by their names, and {name!r} is {shown(value)}")
        why = why_unusable(value)
        if why:
            raise UserError(f"{source} must hold dense floating-point weights, and {name} is {why}")
        name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if name in weights:
            raise UserError(f"{source} has {name} twice, once under a wrapper's name")
        weights[name] = value.detach()
    return weights


def why_unusable(value: Tensor) -> str:
    """What keeps a tensor of a file from being a weight; empty for a good one."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "sparse, nested or quantised"
    if value.device.type != "cpu":
        return f"on {value.device}, without values"
    if value.dtype not in FLOATS:
        return str(value.dtype).removeprefix("torch.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, for which the file has too few values"
    return ""


def require_names(model: nn.Module, weights: Weights, source: str) -> None:
    """UserError, naming the first that does not belong and the first that is missing, unless these are its weights.

    Projectors are passed over. model: may be on the meta device, so that nothing is allocated for what does not fit.
    """
    expected = [name for name in model.state_dict() if not is_projector(name)]
    found = [name for name in weights if not is_projector(name)]
    foreign = next((name for name in found if name not in expected), None)
    missing = next((name for name in expected if name not in found), None)
    if foreign or missing:
        wrong = [f"{foreign} does not belong"] * bool(foreign) + [f"{missing} is missing"] * bool(missing)
        title = get_family(model).title
        raise UserError(f"{source} does not hold the weights of a {title} of its size: {' and '.join(wrong)}")


def require_shapes(model: nn.Module, weights: Weights, source: str) -> None:
    """UserError, naming the first that has not the shape that it has in the model. What is missing is passed over."""
    for name, value in model.state_dict().items():
        if name in weights and weights[name].shape != value.shape:
            has = tuple(weights[name].shape)
            raise UserError(f"{name} of {source} must have the shape {tuple(value.shape)}, and has {has}")


def first_not_finite(weights: Weights) -> str | None:
    """The name of the first weight that holds NaN or infinity."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def is_projector(name: str) -> bool:
    """Whether this is the name of a projector's weight."""
    return name.startswith("projectors.")


# ---- resuming ----


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdecimal())


def read_newest_checkpoint(folder: Path, step: int = 0) -> Checkpoint | None:
    """The checkpoint of `step`, or for 0 the newest whole one; None if there are no files.

    A damaged newest file is passed over with a warning. What REPA's and HASTE's do not hold is None.

    Raises:
        UserError: the wanted file is missing or cannot be resumed from, or none is whole.
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
        check_resumable(checkpoint, path)
        if "rng" not in checkpoint:
            logger.info("%s is another trainer's; its weights and its optimizer are resumed", path)
        return {**dict.fromkeys(("rng", "termination", "scaler")), **checkpoint}
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} is whole; move them away to start again")
    return None


# ---- what is held against what the trainer can resume ----

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


def check_resumable(checkpoint: Checkpoint, path: Path) -> None:
    """UserError, naming the file and the part, if training cannot be resumed from what `read_checkpoint` returns."""
    missing = [name for name in RESUMED if name not in checkpoint]
    if missing:
        raise UserError(
            f"{path} lacks {missing[0]}, so a run cannot be resumed from it; begin a new one with --init-from {path}"
        )
    source = str(path)
    build(TrainConfig, checkpoint["args"], f"args of {path}")  # of another type, they could not be compared
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


# ---- the states of random generators ----


def capture_rng() -> dict[str, Any]:
    """The states of all random generators that training uses, which are the same in every process."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
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


# ---- the identity of a checkpoint ----

DIGEST = "checkpoint_digest"
WRITTEN = "checkpoint_written"  # nanoseconds since 1970, by which earlier versions' records know a checkpoint

PIECES = 64  # read of a file that has no checksums of its own, from its beginning to its end
PIECE = 2**16  # bytes


def checkpoint_identity(path: Path) -> dict[str, Any]:
    """The fields by which a record knows a checkpoint. UserError if the file cannot be read."""
    return {"checkpoint": path.name, DIGEST: content_digest(path)}


def as_before(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A record with `checkpoint_identity` of `path`, as earlier versions wrote it."""
    fields = {name: value for name, value in record.items() if name != DIGEST}
    return {**fields, WRITTEN: path.stat().st_mtime_ns}


def content_digest(path: Path) -> str:
    """12 hexadecimal digits that tell a checkpoint's content, without reading all of it.

    Of torch.save's zip files the names, sizes and checksums of all entries, which are together at the end. Of others
    the size and PIECES pieces, evenly spaced: of a file of up to 4 MiB all of it.
    Raises UserError if it is no file, or cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise UserError(f"the checkpoint {path} does not exist")
        content = _entries(path) or _pieces(path)
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    return hashlib.sha256(content).hexdigest()[:12]


def _entries(path: Path) -> bytes:
    """Of a zip file; empty of another, or if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save puts all into a folder called as the file was when it was written, which tells nothing.
            entries = [(each.filename.partition("/")[2], each.file_size, each.CRC) for each in archive.infolist()]
    except OSError:
        raise
    except Exception:  # a damaged archive leads zipfile to raise anything; reading the weights will say what it is
        return b""
    return repr(entries).encode()


def _pieces(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - PIECE, 0)
        for number in range(PIECES):
            file.seek(last * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return f"{size} {digest.hexdigest()}".encode()
