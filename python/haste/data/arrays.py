"""Arrays of .npy and .npz files. What a header asks for is held against what is there before memory is taken for it."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from haste.data.bad_files import BadFile
from haste.errors import in_one_line
from haste.limits import LARGEST_ARRAY, LARGEST_HEADER, MOST_INFLATION, SMALL_ARRAY, in_bytes

KINDS = "biufcSU"  # of types: numbers and text. Objects would be unpickled, which can do anything
CHUNK = 2**24  # bytes read at a time


class Header(NamedTuple):
    """What an .npy file says of its array; the stream is then at the first value."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: BinaryIO) -> Header:
    """The header of the .npy file that a stream begins with. Raises ValueError if it has none, or that of objects."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8:
        raise ValueError("it does not begin as an .npy file")
    kind = "<H" if start[6] == 1 else "<I"
    prefix = stream.read(struct.calcsize(kind))
    if len(prefix) < struct.calcsize(kind):
        raise ValueError("it is cut short")
    (length,) = struct.unpack(kind, prefix)
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has {in_bytes(length)}; at most {in_bytes(LARGEST_HEADER)} are read")
    whole = io.BytesIO(prefix + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    header = Header(*read(whole))
    if header.dtype.kind not in KINDS or not header.dtype.itemsize or any(side < 0 for side in header.shape):
        raise ValueError(f"it holds {header.dtype} {header.shape}, which is no array of numbers or text")
    return header


def read_array(stream: BinaryIO, available: int, packed: int | None = None) -> np.ndarray:
    """The array of the .npy file that a stream holds.

    available: bytes of the stream, header included; packed: those that it is inflated from.
    Raises ValueError, or whatever else a damaged stream leads to, if there is none or it is beyond the limits.
    """
    header = read_header(stream)
    if header.size > available - stream.tell():
        raise ValueError(f"it is cut short: its header tells of {in_bytes(header.size)}")
    if header.size > LARGEST_ARRAY:
        raise ValueError(f"it has {in_bytes(header.size)}; at most {in_bytes(LARGEST_ARRAY)} are read")
    if packed is not None and header.size > max(SMALL_ARRAY, MOST_INFLATION * packed):
        raise ValueError(f"{in_bytes(packed)} inflate to {in_bytes(header.size)}; at most {MOST_INFLATION} to one")
    values = np.empty(math.prod(header.shape), header.dtype)
    view = values.view(np.uint8)
    for start in range(0, len(view), CHUNK):
        part = stream.read(min(CHUNK, len(view) - start))
        if len(part) < min(CHUNK, len(view) - start):
            raise ValueError("it is cut short")
        view[start : start + len(part)] = np.frombuffer(part, np.uint8)
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file. BadFile, with the path as its name, if it holds none that can be read."""
    try:
        _require_file(path)
        with open(path, "rb") as file:
            return read_array(file, os.fstat(file.fileno()).st_size)
    except Exception as error:  # a damaged file leads numpy to raise anything
        raise BadFile(str(path), f"cannot be read as an .npy file: {in_one_line(error)}") from error


def list_npz(path: Path) -> list[str]:
    """The names of the arrays of an .npz file. BadFile, with the path as its name, if it is none."""
    try:
        _require_file(path)
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except Exception as error:  # a damaged file leads zipfile to raise anything
        raise BadFile(str(path), f"cannot be read as an .npz file: {in_one_line(error)}") from error


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of these arrays that an .npz file has. BadFile, with the path as its name, if they cannot be read."""
    there = set(list_npz(path))
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in (name for name in names if name in there):
            try:
                with open_entry(archive, name) as stream:
                    entry = archive.getinfo(f"{name}.npy")
                    arrays[name] = read_array(stream, entry.file_size, entry.compress_size)
            except Exception as error:  # as above
                raise BadFile(str(path), f"has no {name} that can be read: {in_one_line(error)}") from error
    return arrays


def open_entry(archive: zipfile.ZipFile, name: str) -> BinaryIO:
    """The stream of an array. Raises KeyError if there is none, and ValueError for one that inflates unbounded."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is packed by another method than deflate")
    return archive.open(entry)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError("it is no regular file" if path.exists() else "it does not exist")
