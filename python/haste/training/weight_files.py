"""Files of weights and settings, read without running anything that is in them.

torch.save's files, the older ones too, and safetensors. A file may name any class; of those that torch does not admit
itself none is looked up: a `Foreign` stands in its place, and keeps what the object was made of.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from haste.errors import UserError, in_one_line
from haste.validation import shown
from haste.weights import refuse_inflation

Content = dict[str, Any]

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number with which torch.save began before 1.6

# Modules that torch blocks, whatever else is admitted under their names.
BLOCKED = {"sys", "os", "posix", "nt"}

PATHS = {f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
SCALARS = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
FILLED = {"collections.defaultdict": dict, "collections.Counter": dict, "collections.deque": list}  # item by item
DEEPEST = 50  # levels of settings within settings


class BrokenCheckpoint(UserError):
    """The file is cut short, damaged or no checkpoint at all."""


class Foreign:
    """Stands for an object of the class, or for the result of the function, `of`, and runs nothing of it.

    made_of: the arguments it was to be made from. state: what it was to be given after that.
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


def read_file(path: Path) -> Content:
    """What a file holds, on the CPU: tensors and plain values, argparse.Namespace, and `Foreign` for the rest.

    Paths, numpy's scalars and OmegaConf's configs become plain values. Of safetensors the metadata are the settings,
    `args`.
    Raises BrokenCheckpoint for a file that is damaged or of another kind, and UserError, which says why, for one that
    is whole and cannot be used.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise BrokenCheckpoint(f"{path} is no whole checkpoint: it is no file")
        with open(path, "rb") as file:
            head = file.read(len(LEGACY))
        if head.startswith(ZIP):
            content = _read_zip(path)
        elif head == LEGACY:
            content = _read_legacy(path)
        elif head[8:9] == b"{":
            content = _read_safetensors(path)
        else:
            raise BrokenCheckpoint(f"{path} is no whole checkpoint: neither torch.save nor safetensors has written it")
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    if isinstance(content, Foreign):
        raise UserError(f"{path} holds {content!r} as a whole; it must hold weights, as state_dict() gives them")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dictionary of weights, and holds {type(content).__name__}")
    return content


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            try:
                refuse_inflation(path)
            except ValueError as error:
                raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
            if archive.testzip() is not None:  # torch.load does not look at the checksums that torch.save wrote
                raise BrokenCheckpoint(f"{path} is no whole checkpoint: it is damaged")
    except (OSError, UserError):
        raise
    except Exception as error:  # a damaged archive leads zipfile to raise anything
        raise BrokenCheckpoint(f"{path} is no whole checkpoint: {in_one_line(error)}") from error
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise UserError(f"{path} is a zip file that torch.save has not written; it must be a checkpoint")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        blocked = [name for name in foreign if name.split(".")[0] in BLOCKED]
        if blocked:
            raise UserError(f"{path} wants to call {blocked[0]}, which no checkpoint needs; it is not read")
        stand_ins = [(_stand_in(name), name) for name in foreign if name != "argparse.Namespace"]
        content = _load(path, stand_ins)
    except UserError:
        raise
    except Exception as error:  # the file is whole, and its content is anybody's
        raise UserError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    if not stand_ins or not isinstance(content, dict):
        return content
    return {name: value if name in ("model", "ema", "opt") else to_plain(value) for name, value in content.items()}


def _read_legacy(path: Path) -> Any:
    """There are no checksums in such a file. torch admits its own classes and Namespace, and there are no stand-ins."""
    try:
        return _load(path, [])
    except Exception as error:  # a damaged or foreign file leads torch to raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            raise UserError(
                f"{path} holds a {named[1]}, which is not read from files of torch before 1.6; load it there, and save "
                "its state_dict() with a newer torch"
            ) from error
        raise BrokenCheckpoint(f"{path} is no whole checkpoint: {_reason(error)}") from error


def _load(path: Path, stand_ins: list[tuple[Callable, str]]) -> Any:
    admitted = [argparse.Namespace, *stand_ins]
    with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle's protocols and torch's older storages
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Callable:
    """What is called in place of a class or function of this name."""
    if name in FILLED:
        return lambda *arguments: FILLED[name]()
    return type("Foreign", (Foreign,), {"of": name, "__qualname__": f"Foreign {name}"})  # the name for torch's errors


def _reason(error: Exception) -> str:
    """torch's errors without its advice to read the file unsafely."""
    text = in_one_line(Exception(str(error).rpartition("WeightsUnpickler error: ")[2])).split(" Please ")[0]
    foreign = re.search(r"Foreign (\S+)'>", text)
    return f"it holds a {foreign[1]}; it must hold tensors and plain values" if foreign else text


def _read_safetensors(path: Path) -> Content:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path} is no whole checkpoint: {in_one_line(error)}") from error
    settings = {name: _from_text(text) for name, text in metadata.items() if name != "format"}
    return {"ema": weights, **({"args": argparse.Namespace(**settings)} if settings else {})}


def _from_text(text: str) -> Any:
    """A value of safetensors' metadata, where all is text: a number where it reads as one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---- plain values ----


def to_plain(value: Any, level: int = 0) -> Any:
    """The same with each Foreign that is known to stand for a plain value replaced by that value."""
    if level > DEEPEST:
        raise UserError(f"settings are nested in a checkpoint more than {DEEPEST} levels deep")
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
    """Named values as a dictionary: of a Namespace, a dictionary, an object of any class, or None for none.

    source: names the file and the part of it. Raises UserError for what holds no names.
    """
    if isinstance(value, Foreign) and isinstance(value.state, Mapping):
        value = to_plain(value.state)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{source} must hold named settings, and is {shown(value)}")
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
    """A numpy scalar is made from its dtype, itself a Foreign with its letters and byte order, and bytes."""
    try:
        kind, data = value.made_of
        letters, order = kind.made_of[0], kind.state[1]
        if not re.fullmatch(r"[fiubU]\d{1,3}", letters) or order not in ("<", ">", "|"):
            return value
        return np.frombuffer(data, np.dtype(order.replace("|", "") + letters))[0].item()
    except (ValueError, TypeError, AttributeError, IndexError):
        return value
