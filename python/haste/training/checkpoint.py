"""Checkpoints: reading those of haste, HASTE, REPA, SiT, LightningDiT and DiT; what is needed to resume; the identity
of a file.

A file is laid out as HASTE's and REPA's (model, ema, opt, args, steps), with more keys to resume bit for bit:
model_config, rng, termination, scaler. The order of the images is a function of the step and needs none. Reading runs
no code from the file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haste.errors import UserError, in_one_line
from haste.models import CheckpointFile, Convention, Weights, build_model, check_config, get_family, infer_config
from haste.training import pipeline_folder
from haste.training.config import TrainConfig
from haste.training.optimizer import muon_matrices
from haste.training.settings import is_ours
from haste.vae import LatentFormat
from haste.validation import build, check, shown
from haste.weights import BrokenCheckpoint, read_file, settings_in

logger = logging.getLogger(__name__)

Checkpoint = dict[str, Any]
"""What `read_checkpoint` returns."""

SAMPLING_SETTINGS = ("exp_name", "data_dir", "model", "resolution", "num_classes", "encoder_depth", "path_type", "vae")


def read_checkpoint(
    path: Path, assume: Mapping[str, Any] | None = None, convention: Convention | None = None
) -> Checkpoint:
    """Read a checkpoint of haste, HASTE, REPA, SiT, LightningDiT or DiT, a bare file of weights, or diffusers' DiT.

    Args:
        assume: settings of the run that the file may lack.
        convention: who trained the model, for a file that does not show it.

    Returns:
        The file's content, with `model` and `ema` under haste's names and in its convention, `model_config`, `args` (a
        dictionary of the run's settings) and `convention` (the file's own). Other parts are not checked; see
        `check_resumable`.

    Raises:
        BrokenCheckpoint: a damaged or missing file.
        UserError: a file that cannot be used, or whose convention is not known.
    """
    content = read_file(path)
    if pipeline_folder.is_of_pipeline(content):
        content = pipeline_folder.as_checkpoint(read_parts(content, path)["ema"], path)
    own, config, parts = settings_of(content, path), content.get("model_config"), read_parts(content, path)
    file = CheckpointFile(parts["model"], own, content, path, convention)
    if config is None:
        try:
            config = infer_config(file, assume)
        except UserError:
            refuse_adapters(file.weights, path)
            raise
    try:
        model_config = check_config(config, str(path))
        model, foreign = on_meta(model_config), get_family(model_config).foreign
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    for part, weights in parts.items():
        parts[part] = foreign.rename(weights)
        require_names(model, parts[part], f"{part} of {path}")
    found = foreign.find_convention(file)
    assert found is not None  # else the config would be of another family
    if found != "repa" and content.get("model_config") is None:
        logger.info("%s is read by --convention %s", path, found)
    for part, weights in parts.items():
        parts[part] = weights = foreign.convert_weights(weights, found)
        require_shapes(model, weights, f"{part} of {path}")
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            logger.warning("%s of %s has numbers that are not finite, for example in %s", part, path, broken[0])
    if content.get("class_names") is not None:
        check(content["class_names"], list[str], f"class_names of {path}")
    if content.get("captions") is not None:
        check(content["captions"], list[str], f"captions of {path}")
    _check_null(content.get("null"), get_family(model_config).layout(model_config).condition_shape, path)
    others = content if "model" in content or "ema" in content else {}  # else it is a bare file of weights
    settings = foreign.convert_settings({**(assume or {}), **own}, found)
    return {**others, **parts, "model_config": model_config, "args": settings, "convention": found}


def _check_null(null: Any, shape: tuple[int, ...] | None, path: Path) -> None:
    """Raise UserError if a file's condition that stands for none does not fit the model; only the width of text matters
    to it."""
    if null is None:
        return
    fits = isinstance(null, Tensor) and not why_unusable(null) and shape is not None and null.dim() == len(shape)
    if not fits or null.shape[-1] != shape[-1] or not torch.isfinite(null).all():  # type: ignore[index]
        raise UserError(f"null of {path} must hold finite features of shape {shape}, as the model, got {shown(null)}")


def settings_of(content: Checkpoint, path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a file; empty if it has none. UserError for settings that are no mapping."""
    sections = content.get("config")
    if content.get("args") is None and isinstance(sections, Mapping):  # LightningDiT's trainer keeps its YAML file
        settings = {
            name: value for part in sections.values() if isinstance(part, Mapping) for name, value in part.items()
        }
    else:
        settings = settings_in(content.get("args"), f"args of {path}")
    return {name: value for name, value in settings.items() if is_ours(settings) or value is not None}


def loaded_model(checkpoint: Checkpoint, ema: bool | float = True, fused_attn: bool = True) -> nn.Module:
    """The model of a checkpoint, in eval mode on the CPU and without its projectors.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        ema: load the EMA weights, those of this decay, or else the trained ones.

    Raises:
        UserError: it has no average of this decay.
    """
    config = checkpoint["model_config"]
    model = on_meta(get_family(config).for_sampling(config, fused_attn))
    weights = checkpoint[_part_of(checkpoint, ema)]
    weights = {name: value.float().contiguous() for name, value in weights.items() if not is_projector(name)}
    model.load_state_dict(weights, assign=True)
    get_family(config).set_null(model, checkpoint.get("null"))
    return model.eval()


def _part_of(checkpoint: Checkpoint, ema: bool | float) -> str:
    if isinstance(ema, bool):
        return "ema" if ema else "model"
    known = {part.removeprefix("ema_"): part for part in checkpoint if EXTRA_EMA.fullmatch(part)}
    main = checkpoint["args"].get("ema_decay")
    known = {**({repr(float(main)): "ema"} if isinstance(main, (int, float)) else {}), **known}
    if repr(ema) not in known:
        raise UserError(f"--ema-decay must be one that the checkpoint has, {', '.join(known) or 'which records none'}, "
                        f"got {ema!r}")  # fmt: skip
    return known[repr(ema)]


def on_meta(model_config: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights. UserError for sizes that do not fit together."""
    with torch.device("meta"):
        return build_model(model_config)


def sampling_config(checkpoint: Checkpoint, path: str | Path) -> TrainConfig:
    """The settings of the run. Of another trainer's run only those that sampling needs, so that the rest may have any
    type."""
    args = checkpoint["args"]
    read = args if is_ours(args) else {name: args[name] for name in SAMPLING_SETTINGS if name in args}
    return build(TrainConfig, read, f"args of {path}")


# ---- weights ----

# What torch.compile, DDP, FSDP and activation checkpointing add to the names of weights.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

EXTRA_EMA = re.compile(r"ema_[0-9][0-9.e-]*")  # the averages of --extra-ema-decays, by their decay

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_parts(content: Mapping[str, Any], file: Path) -> dict[str, Weights]:
    """`model` and `ema` (xAR's `model_ema`) of a file, and `ema_0.999` and the like if it has other averages. If it has
    only one of the first two, or is a bare file of weights, both are the same.

    Raises:
        UserError: a file without weights.
    """
    names = {"model": "model", "ema": "model_ema" if is_empty(content.get("ema")) else "ema"}
    names |= {name: name for name in content if EXTRA_EMA.fullmatch(str(name))}
    parts = {
        part: dense_weights(content[name], f"{name} of {file}")
        for part, name in names.items()
        if not is_empty(content.get(name)) or EXTRA_EMA.fullmatch(part)
    }
    if not parts:
        parts["model"] = dense_weights(content.get("state_dict", content), str(file))
    return {**{part: parts.get(part, next(iter(parts.values()))) for part in ("model", "ema")}, **parts}


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)


def dense_weights(values: Any, source: str) -> Weights:
    """The tensors of a state_dict, without the names of wrappers.

    Raises:
        UserError: a value that is not a dense floating-point tensor whose data is in the file; names `source`.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{source} must be a dictionary of weights, got {shown(values)}")
    weights: Weights = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source} must be a dictionary of weights, got {shown(value)} for {name!r}")
        why = why_unusable(value)
        if why:
            raise UserError(f"{source} must hold dense floating-point weights, got {name}, which is {why}")
        name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if name in weights:
            raise UserError(f"{source} must hold each weight once, got {name} with and without a wrapper's name")
        weights[name] = value.detach()
    return weights


def why_unusable(value: Tensor) -> str:
    """What keeps a tensor of a file from being a weight; empty for a usable one."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "sparse, nested or quantized"
    if value.device.type != "cpu":
        return f"on {value.device}, without values"
    if value.dtype not in FLOATS:
        return str(value.dtype).removeprefix("torch.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, for which the file has too few values"
    return ""


def is_projector(name: str) -> bool:
    """Whether a weight of this name is a projector's."""
    return name.startswith("projectors.")


def parameters_in(weights: Weights, model: nn.Module) -> Weights:
    """Those of the weights that the model's optimizer counts: its parameters, and projectors, also freed ones. The rest
    are buffers, and what a state_dict holds for other readers."""
    own = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in weights.items() if name in own or is_projector(name)}


def require_names(model: nn.Module, weights: Weights, source: str) -> None:
    """Raise UserError for the first unexpected and the first missing name. Projectors are not compared."""
    known = model.state_dict()
    own = chain(model.named_parameters(), model.named_buffers())  # a state_dict may hold more, which follows from these
    expected = [name for name, _ in own if name in known and not is_projector(name)]
    foreign = [f"{name} does not belong" for name in weights if not is_projector(name) and name not in known]
    missing = [f"{name} is missing" for name in expected if name not in weights]
    if foreign or missing:
        refuse_adapters([name for name in weights if name not in known], source)
        wrong = " and ".join(foreign[:1] + missing[:1])
        raise UserError(f"{source} does not hold the weights of {get_family(model).title} of its size: {wrong}")


# The names of what fine-tuning adds beside the weights of a model.
ADAPTERS = {"LoRA": re.compile(r"(^|\.)lora_\w+"), "DiffFit": re.compile(r"(^|\.)gamma\d*(\.|$)")}


def refuse_adapters(names: Iterable[str], source: Path | str) -> None:
    """Raise UserError if these names, which no model has, are of a model that has been fine-tuned by additions."""
    for name in names:
        for method, pattern in ADAPTERS.items():
            if pattern.search(name):
                raise UserError(f"{source} must be merged into the weights of its model first, got {name}, which "
                                f"{method} adds beside them")  # fmt: skip


def require_shapes(model: nn.Module, weights: Weights, source: str) -> None:
    """Raise UserError for the first weight of another shape than the model's. Missing weights are ignored."""
    for name, value in model.state_dict().items():
        if name in weights and weights[name].shape != value.shape:
            shape = tuple(weights[name].shape)
            raise UserError(f"{name} of {source} must have the shape {tuple(value.shape)}, got {shape}")


# ---- resuming ----


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdecimal())


def read_newest_checkpoint(folder: Path, step: int = 0) -> Checkpoint | None:
    """Read the checkpoint of `step`, or for 0 the newest undamaged one; None if the folder has none.

    A damaged file is skipped with a warning. Parts that REPA's and HASTE's files lack are None.

    Raises:
        UserError: the checkpoint of `step` does not exist, cannot be resumed from, or all files are damaged.
    """
    paths = list_checkpoints(folder)
    if step:
        paths = [path for path in paths if int(path.stem) == step]
        if not paths:
            raise UserError(f"--resume-step must be the step of a checkpoint in {folder}, got {step}")
    for path in reversed(paths):
        try:
            checkpoint = read_checkpoint(path)
        except BrokenCheckpoint as error:
            logger.warning("%s; trying an earlier one", error)
            continue
        check_resumable(checkpoint, path)
        if "rng" not in checkpoint:
            logger.info("%s is another trainer's; its weights and its optimizer are resumed", path)
        return {**dict.fromkeys(("rng", "termination", "scaler")), **checkpoint}
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {folder} are damaged; move them away to start again")
    return None


LATEST = 2**53  # steps


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
    """Raise UserError, naming file and part, if a run cannot be resumed from what `read_checkpoint` returned."""
    for name in ("opt", "args", "steps"):
        if name not in checkpoint:
            raise UserError(
                f"{path} lacks {name}, so a run cannot be resumed from it; start one with --init-from {path}"
            )
    config = build(TrainConfig, checkpoint["args"], f"args of {path}")
    for part in config.ema_parts:
        if part not in checkpoint:
            raise UserError(f"{path} must hold {part}, an average of --extra-ema-decays {config.extra_ema_decays}")
    steps = check(checkpoint["steps"], int, f"steps of {path}")
    if not 0 <= steps <= LATEST:
        raise UserError(f"steps of {path} must be a number of steps, got {steps}")
    model = on_meta(checkpoint["model_config"])
    counted = parameters_in(checkpoint["model"], model)
    matrices = muon_matrices(model, get_family(model).blocks(model)) if config.optimizer == "muon" else set()
    _check_optimizer(checkpoint["opt"], counted, f"opt of {path}", matrices)
    for name, kind in (("termination", _Termination), ("data", _Data)):
        if checkpoint.get(name) is not None:
            build(kind, checkpoint[name], f"{name} of {path}")
    if checkpoint.get("latents") is not None:  # as of a model of pixels
        LatentFormat.from_dict(checkpoint["latents"], f"latents of {path}")
    if not is_empty(checkpoint.get("scaler")):  # empty for a scaler that is disabled
        build(_Scaler, checkpoint["scaler"], f"scaler of {path}")
    if checkpoint.get("rng") is not None:
        _check_rng(checkpoint["rng"], f"rng of {path}")


def _check_optimizer(opt: Any, parameters: Weights, source: str, matrices: Collection[str] = ()) -> None:
    """Per parameter, in the order of the model, AdamW's step and two moments of its shape, or for the `matrices` Muon's
    momentum; or nothing."""
    state = opt.get("state") if isinstance(opt, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{source} must be the state of AdamW, got {shown(opt)}")
    for number, (name, weight) in enumerate(parameters.items()):
        entry = state.get(number)
        if entry is None:
            continue
        needed = ("momentum_buffer",) if name in matrices else ("exp_avg", "exp_avg_sq")
        moments = [entry.get(moment) for moment in needed] if isinstance(entry, Mapping) else [None]
        fit = all(isinstance(m, Tensor) and not why_unusable(m) and m.shape == weight.shape for m in moments)
        if not fit or (name not in matrices and not _is_count(entry.get("step"))):
            what = "a momentum" if name in matrices else "a step and two moments"
            raise UserError(f"{source} must hold {what} of its shape for {name}, and does not")
        if not all(torch.isfinite(moment).all() for moment in moments):  # they would reach the weights in one step
            raise UserError(f"{source} must hold finite moments, and those for {name} are not")


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        return not why_unusable(step) and step.numel() == 1
    return type(step) in (int, float)


def _check_rng(state: Any, source: str) -> None:
    """Try the states on new generators."""
    try:
        torch.Generator().set_state(state["torch"])
        cuda = state["cuda"]
        if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8 and cuda.numel() == 16):
            raise ValueError("its cuda is no state of a GPU's generator")
        np.random.RandomState().set_state(_numpy_state(state))
        random.Random().setstate(state["python"])
    except Exception as error:  # the generators raise many kinds of errors
        raise UserError(f"{source} must hold the states of random generators: {in_one_line(error)}") from error


def _numpy_state(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, cached = state["numpy"]
    return name, keys.numpy().astype(np.uint32), position, has_gauss, cached


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
    np.random.set_state(_numpy_state(state))
    random.setstate(state["python"])


# ---- the identity of a checkpoint ----

DIGEST = "checkpoint_digest"
WRITTEN = "checkpoint_written"  # nanoseconds since 1970: the identity in records of earlier versions

PIECES = 64  # read of a file without checksums of its own, evenly spaced
PIECE = 2**16  # bytes


def checkpoint_identity(path: Path) -> dict[str, Any]:
    """The fields that identify a checkpoint in a record. UserError if the file cannot be read."""
    return {"checkpoint": path.name, DIGEST: content_digest(path)}


def as_before(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A record with the `checkpoint_identity` of `path`, as earlier versions wrote it."""
    fields = {name: value for name, value in record.items() if name != DIGEST}
    return {**fields, WRITTEN: path.stat().st_mtime_ns}


def initial_checkpoint(path: Path) -> Path:
    """The file of --init-from: itself, the latest checkpoint of a run's folder, or the weights of a DiTPipeline's.
    UserError if there is none."""
    wanted = "--init-from must be a checkpoint or the folder of a run"
    if not os.path.lexists(path):
        raise UserError(f"{wanted}, got {path}, which does not exist")
    if not path.is_dir():
        return path
    weights = pipeline_folder.weights_file(path, "--init-from")
    if weights is not None:
        return weights
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UserError(f"{wanted}, got {path}, which holds no checkpoints")
    return checkpoints[-1]


def content_digest(path: Path) -> str:
    """12 hexadecimal digits that identify a checkpoint's content, without reading all of it.

    For torch.save's zip files: of the names, sizes and checksums of all entries, which are together at the end. For
    others: of the size and PIECES pieces, which are all of a file of up to 4 MiB.

    Raises:
        UserError: it does not exist, or cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise UserError(f"the checkpoint {path} does not exist")
        content = _entries(path) or _pieces(path)
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    return hashlib.sha256(content).hexdigest()[:12]


def _entries(path: Path) -> bytes:
    """Of a zip file; empty for another, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save puts all into a folder that is called as the file was when it was written.
            entries = [(each.filename.partition("/")[2], each.file_size, each.CRC) for each in archive.infolist()]
    except OSError:
        raise
    except Exception:  # zipfile raises anything for a damaged archive; reading the weights will tell what it is
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
