"""Files of weights, read without running anything that is in them.

What torch.save writes, now and before 1.6, safetensors, and the tensors of TorchScript. A file may name any class; of
those that torch does not admit itself none is looked up: a `Foreign` stands in its place, and keeps what the object was
made of.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import pickletools
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.errors import UserError, in_one_line
from haste.validation import shown

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number with which torch.save began before 1.6

# Modules that torch blocks, whatever else is admitted under their names.
BLOCKED = {"sys", "os", "posix", "nt"}

PATHS = {f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
SCALARS = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
FILLED = {"collections.defaultdict": dict, "collections.Counter": dict, "collections.deque": list}  # item by item
TUPLES = (b"t", b"\x85", b"\x86", b"\x87")  # the instructions of a pickle that make one
MOST_TUPLES = 100_000  # a tensor takes four
DEEPEST = 50  # levels of settings within settings


class BrokenCheckpoint(UserError):
    """The file is cut short, damaged or no checkpoint at all."""


class _Damaged(ValueError):
    """Why a file is not whole."""


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


def read_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU.

    Returns:
        Tensors and plain values, argparse.Namespace, and `Foreign` for the rest. Paths, numpy's scalars and OmegaConf's
        configs become plain values. Of safetensors the weights are `ema`, and the metadata are the settings, `args`.

    Raises:
        BrokenCheckpoint: it is damaged or of another kind.
        UserError: it is whole and cannot be used; says why.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            what = "is no regular file" if os.path.lexists(path) else "does not exist"
            raise BrokenCheckpoint(f"the checkpoint {path} {what}")
        content, metadata = _read(path)
    except BrokenCheckpoint:
        raise
    except _Damaged as error:
        raise BrokenCheckpoint(f"{path} is no whole checkpoint: {error}") from error
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    if isinstance(content, Foreign):
        raise UserError(f"{path} holds {content!r} as a whole; it must hold weights, as state_dict() gives them")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dictionary of weights, and holds {type(content).__name__}")
    if metadata is not None:
        settings = {name: _from_text(text) for name, text in metadata.items() if name != "format"}
        return {"ema": content, **({"args": argparse.Namespace(**settings)} if settings else {})}
    return {name: value if name in ("model", "ema", "opt") else to_plain(value) for name, value in content.items()}


def load_weights(path: Path, flag: str) -> Any:
    """Read a file of tensors and plain values alone, on the CPU.

    Args:
        flag: what gave the path, for the message.

    Raises:
        UserError: it holds none, or anything else.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise UserError(f"{flag} must be a file of weights, got {path}, which {what}")
    try:
        return _read(path, foreign=False)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} must be a file of weights, got {path}, which cannot be read: {error}") from error


def _read(path: Path, foreign: bool = True) -> tuple[Any, dict[str, str] | None]:
    """What a file holds, and the metadata of safetensors.

    Raises _Damaged, OSError, and ValueError for a file that is whole and cannot be used.
    """
    with open(path, "rb") as file:
        head = file.read(len(LEGACY))
    if head.startswith(ZIP):
        return _read_zip(path, foreign), None
    if head == LEGACY:
        return _read_legacy(path), None
    if head[8:9] == b"{":
        return _read_safetensors(path)
    raise _Damaged("neither torch.save nor safetensors has written it")


def _read_zip(path: Path, foreign: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            script = any(entry.filename.endswith("/constants.pkl") or "/code/" in entry.filename for entry in entries)
            kept = [entry for entry in entries if not script or _is_of_tensors(entry.filename)]
            refused = _inflation(kept, path)
            # torch.load does not look at the checksums that torch.save wrote.
            damaged = None if refused or script else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged archive leads zipfile to raise anything
        raise _Damaged(in_one_line(error)) from error
    if refused:
        raise ValueError(refused)
    if damaged is not None:
        raise _Damaged("it is damaged")
    pickled = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
    if pickled is None:
        raise ValueError("it is a zip file that torch.save has not written")
    try:
        _check_tuples(path, pickled)
        source = _without_program(path, kept) if script else path
        named = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        if script:
            source.seek(0)  # type: ignore[union-attr]  # the line above has read it
        named = [name for name in named if name != "argparse.Namespace"]
        blocked = [name for name in named if name.split(".")[0] in BLOCKED]
        if blocked:
            raise ValueError(f"it wants to call {blocked[0]}, which no checkpoint needs")
        if named and not (foreign or script):
            raise ValueError(f"it holds more than tensors and plain values: {named[0]}")
        content = _load(source, [(_stand_in(name), name) for name in named])
        return _state_dict(content) if script else content
    except Exception as error:  # the file is whole, and its content is anybody's
        raise ValueError(reason(error)) from error


def _inflation(entries: list[zipfile.ZipInfo], path: Path) -> str | None:
    """Why an archive would fill more memory than it takes on the disk, if it would; torch.save packs nothing."""
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        return f"its {packed[0]} is compressed, which torch.save does not do"
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        return "its entries claim to hold more than its size"
    return None


def _check_tuples(path: Path, pickled: zipfile.ZipInfo) -> None:
    """Refuse a pickle that could nest tuples so deeply that hashing them overflows the stack of the process."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(pickled)
    if sum(map(data.count, TUPLES)) <= MOST_TUPLES:  # bytes of text are counted as well
        return
    if sum(code.name.startswith("TUPLE") for code, _, _ in pickletools.genops(data)) > MOST_TUPLES:
        raise ValueError(f"it holds more than {MOST_TUPLES:,} tuples")


def _is_of_tensors(name: str) -> bool:
    inside = name.partition("/")[2]
    return inside in ("data.pkl", "byteorder") or inside.startswith("data/")


def _without_program(path: Path, entries: list[zipfile.ZipInfo]) -> io.BytesIO:
    """A TorchScript archive without its program, as torch.save would have written it.

    Loading it as it is runs the program's set-up code, which can write files.
    """
    target = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as kept:
        for entry in entries:
            kept.writestr(entry.filename, archive.read(entry))
        kept.writestr(f"{entries[0].filename.partition('/')[0]}/version", "3\n")
    target.seek(0)
    return target


def _state_dict(module: Any) -> dict[str, Tensor]:
    """The tensors among the attributes of a module and of those inside it, by their names in its state dict."""
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
    """There are no checksums in such a file. torch admits its own classes and Namespace, and there are no stand-ins."""
    try:
        return _load(path, [])
    except Exception as error:  # a damaged or foreign file leads torch to raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            raise ValueError(
                f"it holds a {named[1]}, which is not read from files of torch before 1.6; load it there, and save "
                "its state_dict() with a newer torch"
            ) from error
        raise _Damaged(reason(error)) from error


def _load(source: Path | io.BytesIO, stand_ins: list[tuple[Callable, str]]) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle's protocols and torch's older storages
        return torch.load(source, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Callable:
    """What is called in place of a class or function of this name."""
    if name in FILLED:
        return lambda *arguments: FILLED[name]()
    return type("Foreign", (Foreign,), {"of": name, "__qualname__": f"Foreign {name}"})  # the name for torch's errors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            return weights, file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _Damaged(in_one_line(error)) from error


def _from_text(text: str) -> Any:
    """A value of safetensors' metadata, where all is text: a number where it reads as one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def reason(error: Exception) -> str:
    """A loader's error in one line, without torch's advice to read the file unsafely."""
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
    """The bytes of the weights that from_pretrained() would look for in a folder.

    Raises UserError, naming `what`, for a file that would be inflated to any size.
    """
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file()]
    for path in files:
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    refused = _inflation(archive.infolist(), path)
                if refused:
                    raise ValueError(refused)
        except Exception as error:  # a damaged file leads zipfile to raise anything
            raise UserError(f"{what} cannot be loaded: {path.name}: {in_one_line(error)}") from error
    return sum(path.stat().st_size for path in files)


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


# ---- the Hugging Face hub ----

PATIENCE = 2.0  # seconds; the hub's own library tries for half a minute


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers, through the proxy or mirror that its library is set to, within `PATIENCE`."""
    answered = []

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)  # refuses where HF_HUB_OFFLINE is set
        except Exception:  # of which library depends on the version
            return
        answered.append(True)

    # In a thread, since no time-out ends the look-up of a name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def loading_arguments(source: str) -> dict[str, Any]:
    """The arguments of from_pretrained() about where to look: a folder and what was downloaded before need no hub."""
    return {"local_files_only": Path(source).is_dir() or not is_reachable()}


def require_source(name: str, source: str, flag: str) -> None:
    """Raise UserError if `source` is no folder, was not downloaded before, and the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir() or is_reachable() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    raise UserError(
        f"{flag} must be a folder written by save_pretrained(), or a name that was downloaded before, got {name}; "
        "the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    )
