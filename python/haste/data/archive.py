"""A folder of files and a zip of files, read alike: a list of names, and bytes by name.

Names are relative and have forward slashes; hidden files, such as those that macOS leaves, are passed over. Links to
folders are followed, since a subset of a large data set is often a folder of links to its classes, but each folder is
read once: folders themselves go before links to them, and links to a folder that they lie in are passed over.
"""

from __future__ import annotations

import functools
import heapq
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from haste.data.bad_files import BadFile
from haste.errors import UserError, in_one_line
from haste.io import read_bytes
from haste.limits import LARGEST_FILE, in_bytes

logger = logging.getLogger(__name__)


class Archive(Protocol):
    """What a folder and a zip have in common."""

    def names(self) -> list[str]:
        """All files in it, at any depth, sorted."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The bytes of one file; BadFile if it cannot be read."""

    def child(self, name: str) -> Archive | None:
        """The folder of this name inside, or the zip that stands for it; None if there is neither."""

    def locate(self, name: str) -> str:
        """Where a file is, for messages."""


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        walk = _Walk(self.path)
        try:
            names = sorted(walk.files())
        except OSError as error:
            raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error
        if walk.passed_over:
            _tell_of_links(self.locate(walk.passed_over[0]), len(walk.passed_over) - 1)
        return names

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
def _tell_of_links(first: str, more: int) -> None:
    """A line in the log, once."""
    others = f" and {more} more" if more else ""
    logger.warning("passed over the link %s%s: what it leads to is read already", first, others)


class _Walk:
    """The files below a folder, each folder once. passed_over: the links that were not followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed_over: list[str] = []
        self._real_root = os.path.realpath(root)
        self._seen: set[tuple[int, int]] = set()

    def files(self) -> Iterator[str]:
        """Names relative to the root. Raises OSError for a folder that cannot be read."""
        links: list[str] = []
        yield from self._below("", links)
        while links:
            link = heapq.heappop(links)
            if self._leads_up(link) or self._identity(link) in self._seen:
                self.passed_over.append(link)
            else:
                yield from self._below(f"{link}/", links)

    def _below(self, prefix: str, links: list[str]) -> Iterator[str]:
        pending = [prefix]
        while pending:
            prefix = pending.pop()
            identity = self._identity(prefix)
            if identity in self._seen:  # a folder mounted twice
                continue
            self._seen.add(identity)
            with os.scandir(self.root / prefix) as entries:
                for entry in entries:
                    if not _is_visible(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{prefix}{entry.name}/")
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        heapq.heappush(links, prefix + entry.name)
                    else:
                        yield prefix + entry.name

    def _leads_up(self, link: str) -> bool:
        """Whether a link leads to a folder around it, or around the root: then what is beside it would come in too."""
        target = os.path.join(os.path.realpath(self.root / link), "")
        around = (self._real_root, os.path.realpath((self.root / link).parent))
        return any(os.path.join(folder, "").startswith(target) for folder in around)

    def _identity(self, name: str) -> tuple[int, int]:
        status = os.stat(self.root / name)
        return status.st_dev, status.st_ino


class Zip:
    """A zip, or one folder inside it. UserError if the file is no zip."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._file: zipfile.ZipFile | None = None
        self._opened_by = 0
        self._open()

    def _open(self) -> zipfile.ZipFile:
        # One handle per process: forked processes would move each other's position in the file.
        if self._file is None or self._opened_by != os.getpid():
            try:
                self._file = zipfile.ZipFile(self.path)
            except Exception as error:  # a damaged file leads its decoder to raise anything
                raise UserError(f"{self.path} cannot be read as a zip ({in_one_line(error)})") from error
            self._opened_by = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def names(self) -> list[str]:
        inside = [name for name in self._open().namelist() if name.startswith(self.prefix) and not name.endswith("/")]
        names = {name.removeprefix(self.prefix) for name in inside}
        return sorted(name for name in names if all(map(_is_visible, PurePosixPath(name).parts)))

    def has(self, name: str) -> bool:
        return self.prefix + name in self._open().NameToInfo

    def read(self, name: str) -> bytes:
        where = self.locate(name)
        try:
            entry = self._open().getinfo(self.prefix + name)
        except KeyError as error:
            raise BadFile(where, "is missing") from error
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without a bound
            raise BadFile(where, "is packed by another method than deflate")
        if entry.file_size > LARGEST_FILE:
            raise BadFile(where, f"has {in_bytes(entry.file_size)}; at most {in_bytes(LARGEST_FILE)} are read")
        try:
            with self._open().open(entry) as stream:
                return stream.read(entry.file_size)  # no more, whatever it inflates to; checks the checksum
        except Exception as error:  # a damaged entry leads its decompressor to raise anything
            raise BadFile(where, f"cannot be read ({in_one_line(error)})") from error

    def child(self, name: str) -> Archive | None:
        prefix = f"{self.prefix}{name}/"
        if not any(entry.startswith(prefix) for entry in self._open().namelist()):
            return None
        return Zip(self.path, prefix)

    def locate(self, name: str) -> str:
        return f"{self.path}/{self.prefix}{name}"


def open_archive(path: Path, flag: str) -> Archive:
    """The folder or zip at `path`; UserError, naming the flag that it was given by, if it is neither."""
    if os.path.isdir(path):
        return Folder(path)
    if os.path.isfile(path):
        if _is_zip(path):
            return Zip(path)
        raise UserError(f"{flag} is {path}, which is no zip; it must be a folder or a zip (unpack other archives)")
    reason = "is no regular file" if os.path.exists(path) else "does not exist"
    raise UserError(f"{flag} is {path}, which {reason}; it must be a folder or a zip")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # a damaged one leads it to raise anything
        return False


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
