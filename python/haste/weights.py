"""Reading files of weights without executing any of their content.

Formats: torch.save, now and before 1.6, safetensors, and the tensors of TorchScript. A pickle may name any class. Those
that torch does not allow by itself are never imported: a `Foreign` takes their place and keeps the arguments.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haste.errors import UserError, in_one_line
from haste.io import in_bytes
from haste.validation import shown

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6

# Modules that torch blocks even as safe globals.
BLOCKED = {"sys", "os", "posix", "nt"}

TENSOR_ENTRIES = re.compile(r"[^/]*/(data\.pkl|byteorder|data/.*)", re.DOTALL)  # of a TorchScript archive
PATHS = {f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
SCALARS = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
FILLED = {"collections.defaultdict": dict, "collections.Counter": dict, "collections.deque": list}  # built item by item
TUPLES = (b"t", b"\x85", b"\x86", b"\x87")  # the opcodes of a pickle that build one
MOST_TUPLES = 100_000  # a tensor has four
DEEPEST = 50  # levels of nested settings


class BrokenCheckpoint(UserError):
    """The file is missing, truncated, damaged or no checkpoint."""


class _Damaged(ValueError):
    """Why a file is damaged."""


class _Refused(ValueError):
    """Why an intact file is not loaded."""


class Foreign:
    """Placeholder for an object of a class, or the result of a function, that is not allowed to run.

    Attributes:
        of: the name of the class or function.
        made_of: the arguments of the call.
        state: the pickled state of the object.
    """

    of = ""
    made_of: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Foreign:
        self = object.__new__(cls)
        self.made_of, self.state = arguments, None
        return self

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"a {self.of}"


def read_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU.

    Returns:
        Tensors, plain values, argparse.Namespace, and `Foreign` for other objects. Paths, numpy scalars and OmegaConf
        configs are converted to plain values. The weights of a safetensors file are returned as `ema`, and its metadata
        as the settings, `args`.

    Raises:
        BrokenCheckpoint: the file is damaged or of another kind.
        UserError: the file is intact but cannot be used.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise BrokenCheckpoint(f"the checkpoint {path} {_why_no_file(path)}")
        content, metadata = _read(path)
    except BrokenCheckpoint:
        raise
    except _Damaged as error:
        raise BrokenCheckpoint(f"{path} is not a valid checkpoint: {error}") from error
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict):
        kind = repr(content) if isinstance(content, Foreign) else f"a {type(content).__name__}"
        raise UserError(f"{path} must hold a dictionary of weights, as from state_dict(), got {kind}")
    if metadata is not None:
        settings = {name: _from_text(text) for name, text in metadata.items() if name != "format"}
        return {"ema": content, **({"args": argparse.Namespace(**settings)} if settings else {})}
    return {name: value if name in ("model", "ema", "opt") else to_plain(value) for name, value in content.items()}


def load_weights(path: Path, flag: str) -> Any:
    """Read a file of tensors and plain values only, on the CPU. Raises UserError, which names `flag`."""
    try:
        if not path.is_file():
            raise ValueError(f"it {_why_no_file(path)}")
        return _read(path, foreign=False)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} must be a file of weights, got {path}, which cannot be read: {error}") from error


def _why_no_file(path: Path) -> str:
    return "is no regular file" if os.path.lexists(path) else "does not exist"


def _read(path: Path, foreign: bool = True) -> tuple[Any, dict[str, str] | None]:
    """The content of a file, and the metadata of safetensors. Raises _Damaged, OSError or ValueError."""
    with open(path, "rb") as file:
        head = file.read(len(LEGACY))
    if head.startswith(ZIP):
        return _read_zip(path, foreign), None
    if head == LEGACY:
        return _read_legacy(path), None
    if head[8:9] == b"{":
        return _read_safetensors(path)
    raise _Damaged("it is no file of torch.save or safetensors")


def _read_zip(path: Path, foreign: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            script = any(entry.filename.endswith("/constants.pkl") or "/code/" in entry.filename for entry in entries)
            if script:
                entries = [entry for entry in entries if TENSOR_ENTRIES.fullmatch(entry.filename)]
            _refuse_inflation(entries, path)
            # torch.load does not verify the checksums of torch.save.
            if not script and archive.testzip() is not None:
                raise _Damaged("it is damaged")
            pickled = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
            if pickled is None:
                raise _Refused("it is a zip file, but not of torch.save")
            _refuse_deep_tuples(archive.read(pickled))
            source = _without_program(archive, entries) if script else path
    except (OSError, _Damaged, _Refused):
        raise
    except Exception as error:  # zipfile raises anything for a damaged archive
        raise _Damaged(in_one_line(error)) from error
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        named = [name for name in named if name != "argparse.Namespace"]
        blocked = [name for name in named if name.split(".")[0] in BLOCKED]
        if blocked:
            raise ValueError(f"it calls {blocked[0]}, which no checkpoint needs")
        if named and not (foreign or script):
            raise ValueError(f"it holds more than tensors and plain values: {named[0]}")
        content = _load(source, [(_stand_in(name), name) for name in named])
        return _state_dict(content) if script else content
    except Exception as error:  # torch raises anything for unknown content
        raise ValueError(reason(error)) from error


def _refuse_inflation(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse an archive that would inflate: torch.save does not compress."""
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise _Refused(f"its {packed[0]} is compressed, unlike in files of torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _Refused("its entries claim to hold more than its size")


def _refuse_deep_tuples(data: bytes) -> None:
    """Refuse a pickle whose nested tuples could overflow the stack of the process when they are hashed."""
    if sum(map(data.count, TUPLES)) <= MOST_TUPLES:  # an upper bound: counts bytes of text as well
        return
    if sum(code.name.startswith("TUPLE") for code, _, _ in pickletools.genops(data)) > MOST_TUPLES:
        raise _Refused(f"it holds more than {MOST_TUPLES:,} tuples")


def _without_program(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> io.BytesIO:
    """A TorchScript archive in the form of torch.save: without its program, which would run when it is loaded."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as kept:
        for entry in entries:
            kept.writestr(entry.filename, archive.read(entry))
        kept.writestr(f"{entries[0].filename.partition('/')[0]}/version", "3\n")
    target.seek(0)
    return target


def _state_dict(module: Any) -> dict[str, Tensor]:
    """The tensors of a module and its submodules, by their names in its state dict."""
    found, seen, pending = {}, set(), [("", module)]
    while pending:
        prefix, item = pending.pop()
        if id(item) in seen or not isinstance(item, Foreign) or not isinstance(item.state, dict):
            continue
        seen.add(id(item))
        for name, value in item.state.items():
            if not isinstance(value, Tensor):
                pending.append((f"{prefix}{name}.", value))
            elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"the tensor {prefix}{name} is larger than its storage")
            else:
                found[f"{prefix}{name}"] = value
    if not found:
        raise ValueError("it holds no tensors")
    return found


def _read_legacy(path: Path) -> Any:
    """Read a file of torch before 1.6. It has no checksums, and placeholders are not supported."""
    try:
        return _load(path, [])
    except Exception as error:  # torch raises anything for a damaged or foreign file
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            raise ValueError(
                f"it holds a {named[1]}, which is not read from files of torch before 1.6; save its state_dict() with "
                "a newer torch"
            ) from error
        raise _Damaged(reason(error)) from error


def _load(source: Path | io.BytesIO, stand_ins: list[tuple[Callable, str]]) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols and old storages
        return torch.load(source, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Callable:
    """A replacement for the class or function of this name."""
    if name in FILLED:
        return lambda *arguments: FILLED[name]()
    return type("Foreign", (Foreign,), {"of": name, "__qualname__": f"Foreign {name}"})  # named in torch's errors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            return weights, file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _Damaged(in_one_line(error)) from error


def _from_text(text: str) -> Any:
    """A value of safetensors' metadata: parsed if it is JSON, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def reason(error: Exception) -> str:
    """The message of a loader's error in one line, without torch's advice to disable weights_only."""
    text = str(error)
    foreign = re.search(r"Foreign (\S+)'>", text)
    if foreign:
        return f"it holds a {foreign[1]}; it must hold tensors and plain values"
    if "weights_only" not in text and "Weights only" not in text:
        return in_one_line(error)
    _, found, detail = text.rpartition("WeightsUnpickler error: ")
    detail = detail.split("Please")[0].split("Check the documentation")[0]
    return "it holds more than tensors and plain values" + (f": {in_one_line(ValueError(detail))}" if found else "")


def weights_size(folder: Path, what: str) -> int:
    """The bytes of the weights in a folder of from_pretrained(). Raises UserError for compressed or damaged files."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file()]
    for path in files:
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    _refuse_inflation(archive.infolist(), path)
        except Exception as error:  # zipfile raises anything for a damaged file
            raise UserError(f"{what} cannot be loaded: {path.name}: {in_one_line(error)}") from error
    return sum(path.stat().st_size for path in files)


def require_weights(folder: Path, what: str, build: Callable[[], nn.Module], per_byte: float = 1) -> None:
    """Raise UserError if a model asks for more numbers than the files of its folder have bytes, before memory is
    allocated for it.

    Args:
        folder: of from_pretrained().
        what: the model, for messages.
        build: makes the model by its config.
        per_byte: numbers that a byte may stand for; above 1 for files that may leave out parts of the model.
    """
    size = weights_size(folder, what)
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # sizes that do not go together
        raise UserError(f"{what} cannot be loaded: {in_one_line(error)}") from error
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > per_byte * size:
        raise UserError(f"{what} cannot be loaded: its config.json asks for {numbers:,} numbers, but its weights "
                        f"(*.safetensors, *.bin) have {in_bytes(size)}")  # fmt: skip


def to_plain(value: Any, level: int = 0) -> Any:
    """Convert each `Foreign` of a path, a numpy scalar or an OmegaConf config to a plain value."""
    if level > DEEPEST:
        raise UserError(f"settings of a checkpoint must be nested at most {DEEPEST} levels deep, got more")
    if isinstance(value, Foreign):
        return _plain_foreign(value, level)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_named(to_plain(vars(value), level + 1)))
    if type(value) in (dict, OrderedDict):
        return {key: to_plain(item, level + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(item, level + 1) for item in value)
    return value


def settings_in(value: Any, source: str) -> dict[str, Any]:
    """Settings as a dictionary, from a Namespace, a dictionary, a `Foreign` or None. Raises UserError."""
    if isinstance(value, Foreign) and isinstance(value.state, Mapping):
        value = to_plain(value.state)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{source} must be named settings, got {shown(value)}")
    return _named(value)


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: item for name, item in values.items() if isinstance(name, str)}


def _plain_foreign(value: Foreign, level: int) -> Any:
    module = value.of.split(".")[0]
    if (value.of in PATHS or value.of.startswith("pathlib._local.")) and all(type(p) is str for p in value.made_of):
        return str(PurePosixPath(*value.made_of))
    if value.of in SCALARS:
        return _plain_scalar(value)
    if module == "omegaconf" and isinstance(value.state, Mapping):
        for part in ("_content", "_val"):  # of a container, of a node
            if part in value.state:
                return to_plain(value.state[part], level + 1)
    return value


def _plain_scalar(value: Foreign) -> Any:
    """Convert a numpy scalar, whose arguments are its dtype (a `Foreign` of type letters and byte order) and bytes."""
    try:
        kind, data = value.made_of
        letters, order = kind.made_of[0], kind.state[1]
        if not re.fullmatch(r"[fiubU]\d{1,3}", letters) or order not in ("<", ">", "|"):
            return value
        return np.frombuffer(data, np.dtype(order.replace("|", "") + letters))[0].item()
    except (ValueError, TypeError, AttributeError, IndexError):
        return value
