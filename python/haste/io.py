"""Files: written whole or not at all, read within limits, and JSON that somebody else may have written."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line

# What a file may ask for, checked before memory is taken for it.
LARGEST_JSON = 256 * 2**20  # bytes; the labels of ImageNet take 60 MB
LARGEST_FILE = 2**30  # bytes of an image, or of the latents of one, also inside a zip
MOST_PIXELS = 100_000_000  # of one image: 400 MB in memory, 10,000 x 10,000
MOST_ELONGATED = 100  # the longer side over the shorter; the crop first brings the shorter one to --resolution
LARGEST_ARRAY = 16 * 2**30  # bytes; ImageNet in 2,048 features takes 10.5 GB
SMALL_ARRAY = 64 * 2**20  # bytes; below, an array may be packed as tightly as it likes
MOST_INFLATION = 100  # bytes of an array over its bytes in the file; numbers that were measured do not pack so well
MOST_CLASSES = 1_000_000  # each takes a row of the label table: at a width of 1,152, 4.6 GB, and four of them to train
LARGEST_HEADER = 2**16  # bytes in front of an array


def in_bytes(size: int) -> str:
    """A number of bytes with its unit, for messages."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size} bytes"


LOCK = ".lock"  # haste.resumable keeps it in a folder while a command works there

ABANDONED = 3600  # seconds: a writer on another machine, whose process cannot be found here, would have written by then

# What a file or a folder is called before it is whole.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def temporary_path(path: Path) -> Path:
    """.NAME.PID.tmp beside it: what this process calls a file, or a folder, until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, write: Callable[[Path], Any], durable: bool = True) -> None:
    """Call write(temporary path), push it to the disk, then give it its name: a kill leaves the old file or the new.

    Args:
        durable: push it to the disk, so that a power failure, too, leaves one of the two.

    Raises:
        OSError: it cannot be written, or whatever `write` raises; the old file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk as well
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all, and remove what killed writers of the same file have left."""
    remove_abandoned(path)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def save_tensors(path: Path, content: Any) -> None:
    """Write what torch.save can save, whole or not at all."""
    import torch  # which most commands with io do not need at once

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise OSError(in_one_line(error)) from error

    write_atomically(path, write)


@contextmanager
def writing(what: str, kept: str = "") -> Iterator[None]:
    """Turn the OSError of a full disk, or of one that cannot be written, into a UserError.

    Args:
        what: begins the message.
        kept: ends it, such as "what is there is kept, and the same command resumes".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or in_one_line(error)
        raise UserError(f"{what} cannot be written: {reason}" + (f"; {kept}" if kept else "")) from error


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a kill in the middle of a write leaves."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what kills in the middle of a write have left in a folder and those below it.

    To be called by the command that holds the folder, so that nobody else is writing there.
    """
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path):
            _remove(path)


def remove_abandoned(path: Path, held: bool = False) -> None:
    """Delete what killed writers of this one file or folder have left beside it.

    Args:
        held: no other command can be writing it. Else only what no process of this machine is writing, and what is too
            old for one of another machine.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_leftover(leftover) and (held or not _is_being_written(leftover) and _age(leftover) > ABANDONED):
            _remove(leftover)


def _is_being_written(leftover: Path) -> bool:
    """Whether the process in its name lives here and is another one: numbers come again, in containers the same."""
    writer = int(_TEMPORARY.fullmatch(leftover.name)[1])
    if writer == os.getpid():
        return False
    try:
        os.kill(writer, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _age(path: Path) -> float:
    """Seconds since it was written to; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_free(folder: Path) -> bool:
    """Whether a path is free for a command to fill: nothing is there, or a folder with leftovers of killed ones."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(is_leftover(path) or path.name == LOCK for path in folder.iterdir())


def require_space(folder: Path, size: int, what: str = "a checkpoint") -> None:
    """Raise OSError if fewer than `size` bytes are free on the disk of `folder`, or of the parent that exists."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise OSError(f"{folder} has {free / 2**30:.2f} GiB free, and {what} takes {size / 2**30:.2f} GiB")


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Read a regular file; OSError, as for any that cannot be read, if it is none or larger than `limit` bytes."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, in_one_line(error), str(path)) from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, a device never end
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"it is {_kind(status.st_mode)}, not a regular file", str(path))
    if status.st_size > limit:
        reason = f"it has {in_bytes(status.st_size)}; at most {in_bytes(limit)} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    with open(path, "rb") as file:
        return file.read(limit)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_json(path: Path, what: str, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        what: what the file should be, for messages, such as "the settings of a run".
        needs: keys that must be there.

    Raises:
        UserError: it cannot be read or is not that; names the file.
    """
    try:
        data = read_bytes(path, LARGEST_JSON)
    except OSError as error:
        raise UserError(f"{path} must be {what}, and cannot be read: {error.strerror or error}") from error
    return parse_json(data, f"{path}", what, needs)


def parse_json(data: bytes | str, source: str, what: str, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Parse what has been read already, as `read_json`; `source` names it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} must be {what}, and is no JSON: {in_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} must be {what}, a JSON object, and is {type(content).__name__}")
    missing = [name for name in needs if name not in content]
    if missing:
        raise UserError(f"{source} must be {what}, and has no {missing[0]!r}")
    return content
