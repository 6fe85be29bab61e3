"""A folder of files and a zip of files, read alike: a list of names, and bytes by name.

Names are relative and have forward slashes; hidden files, such as those that macOS leaves, are passed over.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from haste.data.bad_files import BadFile
from haste.errors import UserError


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
        def refuse(error: OSError) -> None:
            raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

        found = []
        # Links are followed: a subset of a large data set is often a folder of links to its classes.
        for root, folders, files in os.walk(self.path, onerror=refuse, followlinks=True):
            folders[:] = [name for name in folders if _is_visible(name)]
            inside = os.path.relpath(root, self.path).replace(os.sep, "/")
            prefix = "" if inside == "." else f"{inside}/"
            found += [prefix + name for name in files if _is_visible(name)]
        return sorted(found)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise BadFile(self.locate(name), "is missing") from error
        except OSError as error:
            raise BadFile(self.locate(name), f"cannot be read ({error.strerror})") from error

    def child(self, name: str) -> Archive | None:
        if (self.path / name).is_dir():
            return Folder(self.path / name)
        packed = self.path / f"{name}.zip"
        return Zip(packed) if packed.is_file() else None

    def locate(self, name: str) -> str:
        return str(self.path / name)


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
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path} cannot be read as a zip ({error})") from error
            self._opened_by = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def names(self) -> list[str]:
        inside = [name for name in self._open().namelist() if name.startswith(self.prefix) and not name.endswith("/")]
        names = [name.removeprefix(self.prefix) for name in inside]
        return sorted(name for name in names if all(map(_is_visible, PurePosixPath(name).parts)))

    def has(self, name: str) -> bool:
        return self.prefix + name in self._open().NameToInfo

    def read(self, name: str) -> bytes:
        try:
            return self._open().read(self.prefix + name)  # checks the checksum
        except KeyError as error:
            raise BadFile(self.locate(name), "is missing") from error
        except Exception as error:  # a damaged entry leads its decompressor to raise anything
            raise BadFile(self.locate(name), f"cannot be read ({error})") from error

    def child(self, name: str) -> Archive | None:
        prefix = f"{self.prefix}{name}/"
        if not any(entry.startswith(prefix) for entry in self._open().namelist()):
            return None
        return Zip(self.path, prefix)

    def locate(self, name: str) -> str:
        return f"{self.path}/{self.prefix}{name}"


def open_archive(path: Path, flag: str) -> Archive:
    """The folder or zip at `path`; UserError, naming the flag that it was given by, if it is neither."""
    if path.is_dir():
        return Folder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return Zip(path)
    if path.is_file():
        raise UserError(f"{flag} is {path}, which is no zip; it must be a folder or a zip (unpack other archives)")
    raise UserError(f"{flag} is {path}, which does not exist; it must be a folder or a zip")


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
