"""The tensors of a TorchScript archive, read without running what is in it.

Such an archive is a zip: code/ holds a program, data.pkl a pickle of the module's attributes, data/N the bytes of the
tensors. Loading it as torch does runs the program's set-up code, which can write files. Here the program is not looked
at, and the pickle is not unpickled: a machine of its own follows the few instructions that build plain values. Classes
and functions are only names to it.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_PICKLE = 2**24  # bytes; that of Inception has some 50,000

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_REBUILD = "torch._utils _rebuild_tensor_v2"
_MARK = object()


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
