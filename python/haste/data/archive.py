"""Folders and zips with one interface, and the arrays of .npy and .npz files.

Names are relative, with forward slashes; hidden files, such as those of macOS, are skipped. Links to folders are
followed, since a subset of a large data set is often a folder of links to its classes. But each folder is read once:
folders before links to them, and links to a parent folder are skipped.

The size in an array's header is checked against the file before memory is allocated.
"""

from __future__ import annotations

import functools
import heapq
import io
import logging
import math
import os
import struct
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from haste.errors import BadFile, UserError, in_one_line
from haste.io import (
    LARGEST_ARRAY,
    LARGEST_FILE,
    LARGEST_HEADER,
    MOST_INFLATION,
    SMALL_ARRAY,
    in_bytes,
    read_bytes,
    remove_abandoned,
    write_atomically,
)

logger = logging.getLogger(__name__)

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others inflate without a limit


class Archive(Protocol):
    """A folder or a zip."""

    def names(self) -> list[str]:
        """All files, at any depth, sorted."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Read one file. Raises BadFile if that fails."""

    def child(self, name: str) -> Archive | None:
        """The subfolder of this name, or the zip in its place; None if there is neither."""

    def locate(self, name: str) -> str:
        """The path of a file, for messages."""


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        try:
            files, skipped = _walk(self.path)
        except OSError as error:
            raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error
        if skipped:
            _log_links(self.locate(skipped[0]), len(skipped) - 1)
        return sorted(files)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return read_bytes(self.path / name)
        except FileNotFoundError as error:
            raise BadFile(self.locate(name), "is missing") from error
        except OSError as error:
            raise BadFile(self.locate(name), f"cannot be read ({error.strerror})") from error

    def child(self, name: str) -> Archive | None:
        if os.path.isdir(self.path / name):
            return Folder(self.path / name)
        packed = self.path / f"{name}.zip"
        return Zip(packed) if os.path.isfile(packed) else None

    def locate(self, name: str) -> str:
        return str(self.path / name)


@functools.cache
def _log_links(first: str, more: int) -> None:
    """Log skipped links once."""
    others = f" and {more} more" if more else ""
    logger.warning("skipped the link %s%s, whose folder is read already", first, others)


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, and the links to folders that were skipped. Raises OSError."""
    files: list[str] = []
    links: list[str] = []
    skipped: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending or links:
        prefix = pending.pop() if pending else f"{heapq.heappop(links)}/"
        status = os.stat(root / prefix)
        identity = (status.st_dev, status.st_ino)
        is_link = (root / prefix).is_symlink() and prefix != ""
        if identity in seen or (is_link and _leads_up(root, prefix)):
            skipped += [prefix.rstrip("/")] * is_link  # otherwise a folder that is mounted twice
            continue
        seen.add(identity)
        with os.scandir(root / prefix) as entries:
            for entry in filter(lambda entry: is_visible(entry.name), entries):
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{prefix}{entry.name}/")
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    heapq.heappush(links, prefix + entry.name)
                else:
                    files.append(prefix + entry.name)
    return files, skipped


def _leads_up(root: Path, link: str) -> bool:
    """Whether a link leads to a parent folder of its own or of the root."""
    target = os.path.join(os.path.realpath(root / link), "")
    around = (os.path.realpath(root), os.path.realpath((root / link).parent))
    return any(os.path.join(folder, "").startswith(target) for folder in around)


class Zip:
    """A zip, or one folder inside it. Raises UserError if the file is no zip."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._file: zipfile.ZipFile | None = None
        self._opened_by = 0
        self._open()

    def _open(self) -> zipfile.ZipFile:
        # One handle per process, since forked processes share the position in the file.
        if self._file is None or self._opened_by != os.getpid():
            try:
                self._file = zipfile.ZipFile(self.path)
            except Exception as error:  # zipfile raises anything for a damaged file
                raise UserError(f"{self.path} cannot be read as a zip ({in_one_line(error)})") from error
            self._opened_by = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def names(self) -> list[str]:
        inside = [name for name in self._open().namelist() if name.startswith(self.prefix) and not name.endswith("/")]
        names = {name.removeprefix(self.prefix) for name in inside}
        return sorted(name for name in names if all(map(is_visible, PurePosixPath(name).parts)))

    def has(self, name: str) -> bool:
        return self.prefix + name in self._open().NameToInfo

    def read(self, name: str) -> bytes:
        where = self.locate(name)
        try:
            entry = self._open().getinfo(self.prefix + name)
        except KeyError as error:
            raise BadFile(where, "is missing") from error
        if entry.compress_type not in COMPRESSIONS:
            raise BadFile(where, "is compressed by another method than deflate")
        if entry.file_size > LARGEST_FILE:
            raise BadFile(where, f"has {in_bytes(entry.file_size)}; at most {in_bytes(LARGEST_FILE)} are read")
        try:
            with self._open().open(entry) as stream:
                return stream.read(entry.file_size)  # at most, whatever it inflates to; verifies the checksum
        except Exception as error:  # zipfile raises anything for a damaged entry
            raise BadFile(where, f"cannot be read ({in_one_line(error)})") from error

    def child(self, name: str) -> Archive | None:
        prefix = f"{self.prefix}{name}/"
        if not any(entry.startswith(prefix) for entry in self._open().namelist()):
            return None
        return Zip(self.path, prefix)

    def locate(self, name: str) -> str:
        return f"{self.path}/{self.prefix}{name}"


def open_archive(path: Path, flag: str) -> Archive:
    """Open a folder or a zip. Raises UserError, which names `flag`, for anything else."""
    if os.path.isdir(path):
        return Folder(path)
    if _is_zip(path):
        return Zip(path)
    reason = "is no zip (unpack other archives)" if os.path.isfile(path) else "is no regular file"
    raise UserError(
        f"{flag} must be a folder or a zip, got {path}, which {reason if os.path.exists(path) else 'does not exist'}"
    )


def _is_zip(path: Path) -> bool:
    try:
        return os.path.isfile(path) and zipfile.is_zipfile(path)
    except Exception:  # zipfile raises anything for a damaged file
        return False


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


KINDS = "biufcSU"  # of dtypes: numbers and text. Objects would be unpickled, which can execute anything
CHUNK = 2**24  # bytes read at a time


class Header(NamedTuple):
    """The header of an .npy file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Read a header, up to the first value. Raises ValueError if it is none, or of an array of objects."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8:
        raise ValueError("it is no .npy file")
    kind = "<H" if start[6] == 1 else "<I"
    prefix = stream.read(struct.calcsize(kind))
    if len(prefix) < struct.calcsize(kind):
        raise ValueError("it is truncated")
    (length,) = struct.unpack(kind, prefix)
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has {in_bytes(length)}; at most {in_bytes(LARGEST_HEADER)} are read")
    whole = io.BytesIO(prefix + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    header = Header(*read(whole))
    if header.dtype.kind not in KINDS or not header.dtype.itemsize or any(side < 0 for side in header.shape):
        raise ValueError(f"it must hold numbers or text, got {header.dtype} {header.shape}")
    return header


def read_array(stream: IO[bytes], available: int, packed: int | None = None) -> np.ndarray:
    """Read an .npy stream of `available` bytes, `packed` in the file. Raises ValueError beyond the limits."""
    header = read_header(stream)
    if header.size > available - stream.tell():
        raise ValueError(f"it is truncated: its header claims {in_bytes(header.size)}")
    if header.size > LARGEST_ARRAY:
        raise ValueError(f"it has {in_bytes(header.size)}; at most {in_bytes(LARGEST_ARRAY)} are read")
    if packed is not None and header.size > max(SMALL_ARRAY, MOST_INFLATION * packed):
        raise ValueError(f"{in_bytes(packed)} inflate to {in_bytes(header.size)}; at most {MOST_INFLATION} to one")
    values = np.empty(math.prod(header.shape), header.dtype)
    missing = values.view(np.uint8).data
    while missing:
        part = stream.read(min(CHUNK, len(missing)))
        if not part:
            raise ValueError("it is truncated")
        missing[: len(part)] = part
        missing = missing[len(part) :]
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def read_npy(path: Path) -> np.ndarray:
    """Read an .npy file. Raises BadFile if that fails."""
    try:
        _require_file(path)
        with open(path, "rb") as file:
            return read_array(file, os.fstat(file.fileno()).st_size)
    except Exception as error:  # numpy raises anything for a damaged file
        raise BadFile(str(path), f"cannot be read as an .npy file: {in_one_line(error)}") from error


def list_npz(path: Path) -> list[str]:
    """The names of the arrays of an .npz file. Raises BadFile for any other file."""
    try:
        _require_file(path)
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except Exception as error:  # zipfile raises anything for a damaged file
        raise BadFile(str(path), f"cannot be read as an .npz file: {in_one_line(error)}") from error


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that have one of these names. Raises BadFile if that fails."""
    found = set(list_npz(path)).intersection(names)
    with zipfile.ZipFile(path) as archive:
        return _read_entries(archive, found, str(path))


def decode_npz(data: bytes, names: Collection[str], where: str) -> dict[str, np.ndarray]:
    """As `read_npz`, of the bytes of a file that messages call `where`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = {name for name in names if f"{name}.npy" in archive.NameToInfo}
            return _read_entries(archive, found, where)
    except BadFile:
        raise
    except Exception as error:  # zipfile raises anything for a damaged file
        raise BadFile(where, f"cannot be read as an .npz file: {in_one_line(error)}") from error


def _read_entries(archive: zipfile.ZipFile, names: Iterable[str], where: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name in names:
        try:
            with open_entry(archive, name) as stream:
                entry = archive.getinfo(f"{name}.npy")
                arrays[name] = read_array(stream, entry.file_size, entry.compress_size)
        except Exception as error:  # as above
            raise BadFile(where, f"has no readable {name}: {in_one_line(error)}") from error
    return arrays


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an .npz, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    remove_abandoned(path)
    write_atomically(path, write)


def open_entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open an array. Raises KeyError if it does not exist, ValueError if it could inflate without a limit."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in COMPRESSIONS:
        raise ValueError("it is compressed by another method than deflate")
    return archive.open(entry)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError("it is no regular file" if path.exists() else "it does not exist")
