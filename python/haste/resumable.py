"""Folders and logs of commands that can be killed and resumed: locks, a check of the settings, JSON Lines.

The lock is a POSIX record lock (fcntl.lockf): it works on NFS, and the system frees it when the process ends. Closing
any handle of the file frees it as well, so the process that holds it never opens the file again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from haste.errors import UserError, shorten
from haste.io import LOCK, is_free, read_bytes, read_json, remove_leftovers, write_json, writing

logger = logging.getLogger(__name__)

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
SAME_COMMAND = "existing files are kept, and the same command resumes"


class ResumableDir:
    """A folder that one command fills, and that the same command resumes after a kill.

    Opening it writes nothing.

    Args:
        path: the folder, which need not exist.
        settings: plain values, the same in every command that fills the folder.

    Attributes:
        saved: the content of the record; None in a new folder.

    Raises:
        UserError: the folder holds something else, or has other settings; names the flag and the differences.
    """

    flag: ClassVar[str]  # that gives the folder
    content: ClassVar[str]  # for messages
    record_name: ClassVar[str]

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they are read back: tuples become lists
        self.saved: dict[str, Any] | None = None
        self.reopen()

    @property
    def record(self) -> Path:
        return self.path / self.record_name

    def reopen(self) -> None:
        """Read the record and check it."""
        self.saved = None
        if self.record.is_file():
            saved = read_json(self.record, f"the record of {self.content}")
            self.check_same_config(saved)
            self.saved = saved
        elif not self.may_begin():
            raise UserError(
                f"{self.flag} must be a new folder, or one with {self.content}, got {self.path}, "
                "which holds something else"
            )

    def may_begin(self) -> bool:
        """Whether a folder without a record may be filled."""
        return is_free(self.path)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """'num_steps 4, not 5' for each setting that differs from the record."""
        return differences({name: saved[name] for name in self.settings if name in saved}, self.settings)

    def check_same_config(self, saved: Mapping[str, Any]) -> None:
        """Raise UserError, with the first differences, if the saved settings are not those of this command."""
        found = self.differences(saved)
        if found:
            others = " and others" if len(found) > 3 else ""
            raise UserError(
                f"{self.flag} must be another folder, got {self.path}, which holds {self.content} with "
                f"{'; '.join(found[:3])}{others}"
            )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder.

        Raises:
            UserError: another command holds it, or it cannot be written.
        """
        with hold(self.path, f"{self.flag} {self.path} is in use", f"choose another {self.flag}, or wait", self.flag):
            self.reopen()  # another command may have changed it
            yield

    def remove_leftovers(self) -> None:
        """Delete unfinished files. Only for the command that holds the folder."""
        remove_leftovers(self.path)

    def write_record(self, content: Mapping[str, Any]) -> None:
        """Replace the record atomically."""
        with self.writing():
            write_json(self.record, content)
        self.saved = dict(content)

    def writing(self) -> AbstractContextManager[None]:
        """Convert an OSError of a write to a UserError that names the flag."""
        return writing(f"{self.flag} {self.path}", SAME_COMMAND)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """'num_steps 4, not 5' for each name whose values differ."""
    return [
        f"{name} {shorten(saved.get(name, 'unset'))}, not {shorten(wanted.get(name, 'unset'))}"
        for name in dict.fromkeys([*saved, *wanted])
        if saved.get(name) != wanted.get(name)
    ]


# ---- JSON Lines ----


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the objects of a .jsonl file, and count damaged lines except for a truncated last one. Raises UserError."""
    if not os.path.lexists(path):
        return [], 0
    try:
        lines = read_bytes(path).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    records = [_parse(line) for line in lines]
    # A complete line ends in a newline, so the last element is empty or truncated.
    damaged = sum(record is None and bool(line.strip()) for line, record in zip(lines[:-1], records, strict=False))
    return [record for record in records if record is not None], damaged


def _parse(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def append_line(path: Path, record: Mapping[str, Any], durable: bool = False) -> None:
    """Append one line to a .jsonl file, in place of a truncated last one, or raise OSError and leave it as it was."""
    data = json.dumps(record).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        last = _last_line(file)
        end = file.seek(0, os.SEEK_END)
        if last and _parse(last) is not None:
            data = b"\n" + data
        elif last:
            end = file.truncate(end - len(last))
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise
        if durable:
            os.fsync(file.fileno())


def _last_line(file: BinaryIO) -> bytes:
    """The bytes after the last newline."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start and b"\n" not in tail:
        step = min(start, 2**16)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    return tail.rpartition(b"\n")[2]


# ---- locks ----

_held: set[Path] = set()


@contextmanager
def hold(folder: Path, taken: str, way_out: str = "choose another, or wait", flag: str = "the path") -> Iterator[None]:
    """Lock a folder; create it if it does not exist, and remove it if it stays empty.

    On a file system without locks it only logs a warning.

    Args:
        taken: begins the message if the folder is locked, such as "--exp-name x is being trained".
        way_out: ends the message.
        flag: that gives the folder.

    Raises:
        UserError: another process, or this one, holds the folder, or it cannot be written.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder.resolve() / LOCK
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(path, wait=False)
        except OSError as error:
            raise UserError(f"{flag} must be a folder that can be written, got {folder}: {error.strerror}") from error
        if file is None:
            raise UserError(f"{taken} by {_owner(path)}; {way_out}")
        try:
            yield
        finally:
            _release(path, file)
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # only where it is empty


@contextmanager
def updating(path: Path) -> Iterator[None]:
    """Lock a file that is read and then replaced; waits for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent.resolve() / f".{path.name}{LOCK}"
    file = _lock(beside, wait=True)
    try:
        yield
    finally:
        if file is not None:  # None: another thread of this process holds it; reads and writes are atomic anyway
            _release(beside, file)


def _lock(path: Path, wait: bool) -> int | None:
    """The handle of the locked file; None if another process or this one holds it."""
    while path not in _held:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning("%s cannot be locked (%s); run no other command on it", path.parent, error.strerror)
            else:
                os.close(handle)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                raise
        if _is_current(path, handle):
            _held.add(path)
            _write_owner(handle)
            return handle
        os.close(handle)  # the previous owner has removed it in the meantime
    return None


def _is_current(path: Path, handle: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    """Remove the file while it is still locked, then unlock it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(handle)
    _held.discard(path)


def _write_owner(handle: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with suppress(OSError):  # on a full disk the lock has no owner's name
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _owner(path: Path) -> str:
    """The process that holds a lock, as far as it is known."""
    if path in _held:
        return f"this process, {os.getpid()}"
    try:
        text = path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        text = ""
    return text if text.startswith("process ") and text.isprintable() else "another process"
