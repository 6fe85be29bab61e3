"""One command at a time in a folder: a lock that dies with its owner, whatever ends it, also on network disks.

POSIX record locks (fcntl.lockf), which NFS passes on to its server. The system lets go of one when its process ends; a
worker process that outlives it does not hold it. They belong to a process and a file: closing any handle of the file
gives the lock up, so a process that holds one never opens the file again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from haste.errors import UserError
from haste.io import LOCK

logger = logging.getLogger(__name__)

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_held: set[Path] = set()


@contextmanager
def hold(folder: Path, taken: str, way_out: str = "choose another, or wait until it has ended") -> Iterator[None]:
    """Hold a folder, which is made if it is not there and removed again if nothing was put into it.

    taken: begins the sentence if another process holds it, such as "--exp-name x is being trained". way_out: ends it.
    Where the file system knows no locks, a warning says so. Raises UserError if it is held, or cannot be written.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder.resolve() / LOCK
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(path, wait=False)
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be used: {error.strerror}") from error
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
    """Around reading a file and replacing it: another process that wants to do so waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent.resolve() / f".{path.name}{LOCK}"
    file = _lock(beside, wait=True)
    try:
        yield
    finally:
        if file is not None:  # None: another thread is in here, and what it reads and writes is whole all the same
            _release(beside, file)


def _lock(path: Path, wait: bool) -> int | None:
    """The handle of the locked file; None if another process holds it, or this one."""
    while path not in _held:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning("%s cannot be locked (%s); let no other command write it", path.parent, error.strerror)
            else:
                os.close(handle)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                raise
        if _is_current(path, handle):
            _held.add(path)
            _write_owner(handle)
            return handle
        os.close(handle)  # its last owner has removed it in the meantime
    return None


def _is_current(path: Path, handle: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    """Remove the file, while it is still locked, and let go of it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(handle)
    _held.discard(path)


def _write_owner(handle: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with suppress(OSError):  # a full disk: the lock holds, without a name on it
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _owner(path: Path) -> str:
    """Who holds it, as far as can be read."""
    if path in _held:
        return f"this process, {os.getpid()}"
    try:
        text = path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        text = ""
    return text if text.startswith("process ") and text.isprintable() else "another process"
