"""The Hugging Face hub: whether it answers, found out once and quickly. Its own library tries for half a minute.

Files of tensors, of every kind that weights go about in. Nothing in them is executed.

The tensors of a TorchScript archive, read without running what is in it.

Such an archive is a zip: code/ holds a program, data.pkl a pickle of the module's attributes, data/N the bytes of the
tensors. Loading it as torch does runs the program's set-up code, which can write files. Here the program is not looked
at, and the pickle is not unpickled: a machine of its own follows the few instructions that build plain values. Classes
and functions are only names to it.
"""

from __future__ import annotations

import functools
import math
import os
import pickletools
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste.errors import UserError, in_one_line

PATIENCE = 2.0  # seconds


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers, through whatever proxy or mirror its library was told of, within `PATIENCE`."""
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
    """What from_pretrained() is told of where to look: a folder and what was downloaded before need no hub."""
    return {"local_files_only": Path(source).is_dir() or not is_reachable()}


def refuse_unreachable(name: str, source: str, flag: str) -> None:
    """UserError if `source` is no folder, was not downloaded before, and the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir() or is_reachable() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    raise UserError(
        f"{flag} is {name}, which is no folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
        "it must be a folder written by save_pretrained(), or a name that was downloaded before"
    )


def load_weights(path: Path, flag: str) -> Any:
    """What a file holds, on the CPU: what torch.save has written, the tensors of safetensors or of TorchScript.

    flag: what gave the path, for the sentence.
    Raises UserError if it holds none, or anything but tensors and plain values.
    """
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{flag} is {path}, which {what}; it must be a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        refuse_inflation(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file leads its reader to raise anything
        raise UserError(f"{flag} is {path}, which cannot be read as weights: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What a loader's error says, fit for a sentence, without torch's advice to let the file do as it likes."""
    text = str(error)
    if "weights_only" not in text and "Weights only" not in text:
        return in_one_line(error)
    _, found, detail = text.rpartition("WeightsUnpickler error: ")
    detail = detail.split("Please")[0].split("Check the documentation")[0]
    return "it holds more than tensors and plain values" + (f": {in_one_line(ValueError(detail))}" if found else "")


def refuse_inflation(path: Path) -> None:
    """ValueError for a file that would fill more memory than it takes on the disk; torch.save packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"its {packed[0]} is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries claim to hold more than its size")


def weights_size(folder: Path, what: str) -> int:
    """The bytes of the weights that from_pretrained() would look for in a folder.

    Raises UserError, naming `what`, for a file that would be inflated to any size.
    """
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file()]
    for path in files:
        try:
            refuse_inflation(path)
        except Exception as error:  # a damaged file leads zipfile to raise anything
            raise UserError(f"{what} cannot be loaded: {path.name}: {in_one_line(error)}") from error
    return sum(path.stat().st_size for path in files)


LARGEST_PICKLE = 2**24  # bytes; that of Inception has some 50,000

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_REBUILD = "torch._utils _rebuild_tensor_v2"
_MARK = object()


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with a program in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except Exception:  # a damaged file leads zipfile to raise anything
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors among a module's attributes, by their names in its state dict, on the CPU.

    Raises ValueError, KeyError and the like, or what zipfile raises, for an archive that is none or is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if archive.getinfo(f"{root}data.pkl").file_size > LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has more than {LARGEST_PICKLE >> 20} MiB")
        if f"{root}byteorder" in archive.namelist() and _stored(archive, f"{root}byteorder") != b"little":
            raise ValueError("its numbers are not in little-endian order")
        storages: dict[str, Tensor] = {}
        found = {}
        for name, pieces in _tensors(_run(_stored(archive, f"{root}data.pkl"))):
            key, dtype = pieces.storage.key, pieces.storage.dtype
            if key not in storages:
                data = bytearray(_stored(archive, f"{root}data/{key}"))
                storages[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            found[name] = pieces.view(storages[key].view(dtype))
        if not found:
            raise ValueError("it holds no tensors")
        return found


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch packs nothing; what inflates has no bound
        raise ValueError(f"its {name} is compressed")
    return archive.read(name)


@dataclass
class _Storage:
    key: str
    dtype: torch.dtype


@dataclass
class _Pieces:
    """What a tensor is to be made of."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, storage: Tensor) -> Tensor:
        numbers = (self.offset, *self.size, *self.stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(self.size) != len(self.stride):
            raise ValueError("a tensor has no plain shape")
        last = self.offset + sum((side - 1) * step for side, step in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) > len(storage) or (0 not in self.size and last >= len(storage)):
            raise ValueError("a tensor is larger than its storage")
        return storage.as_strided(self.size, self.stride, self.offset)


@dataclass
class _Object:
    """An instance of some class, or the result of some function: a name, and the attributes that it was given."""

    name: str
    state: Any = None


def _tensors(root: Any) -> Iterator[tuple[str, _Pieces]]:
    """Names and pieces of the tensors below the attributes of an object, each object once."""
    seen, pending = set(), [("", root)]
    while pending:
        prefix, item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        state = item.state if isinstance(item, _Object) else None
        for name, value in (state if isinstance(state, dict) else {}).items():
            if isinstance(value, _Pieces):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Object):
                pending.append((f"{prefix}{name}.", value))


def _run(pickle: bytes) -> Any:
    """What a pickle leaves, with `_Object`s for instances and strings for classes. ValueError for an instruction that
    TorchScript does not write."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = max(index for index, item in enumerate(stack) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Object(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = above_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][_text(key)] = value
            case "SETITEMS":
                items = above_mark()
                stack[-1].update(zip(map(_text, items[::2]), items[1::2], strict=True))
            case "BINPERSID":
                _, kind, key, *_ = stack.pop()
                stack.append(_Storage(_text(key), _DTYPES[kind.name.removeprefix("torch ")]))
            case "NEWOBJ" | "REDUCE":
                arguments, made = stack.pop(), stack.pop()
                stack.append(_Pieces(*arguments[:4]) if made.name == _REBUILD else _Object(made.name))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ValueError(f"its data.pkl has the instruction {opcode.name}")
    raise ValueError("its data.pkl has no end")


def _text(key: Any) -> str:
    """A key, which must be text: to hash tuples in tuples in tuples without end would be a crash."""
    if type(key) is not str:
        raise ValueError(f"its data.pkl has a {type(key).__name__} where text must be")
    return key
