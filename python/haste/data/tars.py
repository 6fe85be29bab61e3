"""Webdataset's tars as one archive: the members of all, found by their offsets, so that any is read by itself."""

from __future__ import annotations

import logging
import os
import tarfile
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
        flag: that named them, for messages.
        on_bad_file: "skip" keeps what stands before the damage in a damaged tar.

    Raises:
        UserError: with "refuse", a file that is no tar, is compressed or ends early.
    """

    def __init__(self, paths: list[Path], flag: str, on_bad_file: OnBadFile = "refuse") -> None:
        self.paths = paths
        self.damaged: list[BadFile] = []
        found: list[tuple[bytes, int, int, int]] = []
        for number, path in enumerate(paths):
            found += [(os.fsencode(name), number, start, size) for name, start, size in self._scan(path)]
            if self.damaged and on_bad_file == "refuse":
                raise self.damaged[0].as_user_error()
        found.sort()
        # Arrays: reference counting would copy millions of objects into every worker process.
        self._names = np.array([name for name, *_ in found], dtype=np.bytes_)
        self._places = np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 3)

    def _scan(self, path: Path) -> list[tuple[str, int, int]]:
        """Name, offset and size of each member."""
        members = []
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
            self.damaged.append(BadFile(str(path), f"is no whole, uncompressed tar ({in_one_line(error)})"))
        return members

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


def open_tars(paths: list[Path], flag: str, on_bad_file: OnBadFile) -> Tars:
    """Open tars. Raises UserError as `Tars`, and if none has members."""
    tars = Tars(paths, flag, on_bad_file)
    for fault in tars.damaged:
        logger.warning("skipped: %s", fault)
    if not len(tars.names()):
        raise UserError(f"{flag} must hold tars of images and captions, got nothing in {paths[0]}")
    return tars
