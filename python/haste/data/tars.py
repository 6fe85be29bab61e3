"""Webdataset's tars as one archive: the members of all, found by their offsets, so that any is read by itself."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from haste.data.archive import Archive, is_visible
from haste.errors import BadFile, OnBadFile, UserError, in_one_line
from haste.io import LARGEST_FILE, in_bytes

logger = logging.getLogger(__name__)

SUFFIX = ".tar"


def find_tars(path: Path) -> list[Path]:
    """The tars that a path names: itself, or those of a folder, sorted; empty if there are none."""
    if os.path.isfile(path):
        return [path] if path.name.endswith(SUFFIX) else []
    return sorted(tar for tar in path.glob(f"*{SUFFIX}") if is_visible(tar.name) and tar.is_file())


class Tars:
    """An `Archive` of the regular members of uncompressed tars, named as TAR/MEMBER.

    Args:
        paths: the tars, of different names.
        names: of the members, sorted bytes.
        places: (n, 3), int64: the number of the tar, the offset and the size of each.
        damaged: tars of which only a part was read.
    """

    def __init__(
        self, paths: list[Path], names: np.ndarray, places: np.ndarray, damaged: Sequence[BadFile] = ()
    ) -> None:
        self.paths = paths
        # Arrays: reference counting would copy millions of objects into every worker process.
        self._names, self._places = names, places
        self.damaged = damaged

    @property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """names and places, as given."""
        return self._names, self._places

    def only(self, names: list[str]) -> Tars:
        """The same tars with some members only."""
        wanted = np.sort(np.array([os.fsencode(name) for name in names], dtype=np.bytes_))
        return Tars(self.paths, wanted, self._places[np.searchsorted(self._names, wanted)], self.damaged)

    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in self._names.tolist()]

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> bytes:
        place = self._find(name)
        if place is None:
            raise BadFile(self.locate(name), "is missing")
        number, start, size = place
        if size > LARGEST_FILE:
            raise BadFile(self.locate(name), f"has {in_bytes(size)}; at most {in_bytes(LARGEST_FILE)} are read")
        try:
            with open(self.paths[number], "rb") as file:
                data = os.pread(file.fileno(), size, start)
        except OSError as error:
            raise BadFile(self.locate(name), f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise BadFile(self.locate(name), "is truncated")
        return data

    def child(self, name: str) -> Archive | None:
        return None

    def locate(self, name: str) -> str:
        return str(self.paths[0].parent / name)

    def _find(self, name: str) -> tuple[int, int, int] | None:
        """The number of the tar, the offset and the size of a member."""
        wanted = os.fsencode(name)
        index = int(np.searchsorted(self._names, wanted)) if len(self._names) else 0
        if index == len(self._names) or self._names[index] != wanted:
            return None
        number, start, size = self._places[index].tolist()
        return number, start, size


def scan_tars(paths: list[Path], on_bad_file: OnBadFile = "refuse") -> Tars:
    """Find the members of tars by their headers. "skip" keeps what stands before the damage in a damaged tar.

    Raises:
        UserError: with "refuse", a file that is no tar, is compressed or ends early.
    """
    found: list[tuple[bytes, int, int, int]] = []
    damaged: list[BadFile] = []
    for number, path in enumerate(paths):
        members, fault = _scan(path)
        found += [(os.fsencode(name), number, start, size) for name, start, size in members]
        if fault is not None:
            damaged.append(fault)
            if on_bad_file == "refuse":
                raise fault.as_user_error()
    found.sort()
    names = np.array([name for name, *_ in found], dtype=np.bytes_)
    places = np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 3)
    return Tars(paths, names, places, damaged)


def _scan(path: Path) -> tuple[list[tuple[str, int, int]], BadFile | None]:
    """Name, offset and size of each member, and the damage behind them."""
    members: list[tuple[str, int, int]] = []
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:  # "r:" reads no compressed ones
            for member in tar:
                visible = all(map(is_visible, PurePosixPath(member.name).parts))
                if not (member.isreg() and visible) or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                members.append((f"{path.name}/{member.name.removeprefix('./')}", member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        return members, BadFile(str(path), f"is no whole, uncompressed tar ({in_one_line(error)})")
    return members, None


def open_tars(paths: list[Path], flag: str, on_bad_file: OnBadFile) -> Tars:
    """Open tars. Raises UserError as `scan_tars`, and if none has members."""
    tars = scan_tars(paths, on_bad_file)
    for fault in tars.damaged:
        logger.warning("skipped: %s", fault)
    if not len(tars.names()):
        raise UserError(f"{flag} must hold tars of images, got nothing in {paths[0]}")
    return tars


def first_dot(name: str) -> tuple[str, str]:
    """The name of a file without its suffix, cut at the first dot of its own name as webdataset does, and the suffix
    with its dot."""
    folder, slash, own = name.rpartition("/")
    stem, dot, suffix = own.partition(".")
    return folder + slash + stem, dot + suffix
