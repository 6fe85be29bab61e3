"""Files: written whole or not at all, and JSON that somebody else may have written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from haste.errors import UserError, in_one_line
from haste.limits import LARGEST_FILE, LARGEST_JSON, in_bytes

Json = TypeVar("Json", dict, list)

# What write_atomically calls a file before it is whole: .NAME.PID.tmp
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), push it to the disk, then give it its name: a kill leaves the old file or the new.

    Raises OSError where the file system does, and whatever `write` raises; the old file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk as well
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for UTF-8 text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """`write_atomically` for JSON."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def is_leftover(path: Path) -> bool:
    """Whether a file is what a kill in the middle of `write_atomically` leaves."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what kills in the middle of a write have left in a folder and those below it."""
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def holds_nothing(folder: Path) -> bool:
    """Whether a path is free for a command to fill: nothing is there, or a folder with leftovers alone."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(is_leftover(path) for path in folder.iterdir())


def require_space(folder: Path, size: int, what: str = "a checkpoint") -> None:
    """OSError if there are not so many bytes free on the disk of `folder`, or of the parent that exists."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise OSError(f"{folder} has {free / 2**30:.2f} GiB free, and {what} takes {size / 2**30:.2f} GiB")


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """The content of a regular file. OSError, as for any that cannot be read, if it is none or larger than `limit`."""
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


def read_json(path: Path, what: str, kind: type[Json] = dict, needs: Iterable[str] = ()) -> Json:
    """The content of a JSON file.

    what: what the file should be, for the sentence, such as "the settings of a run".
    kind: dict or list.
    needs: keys that must be there.
    Raises UserError, naming the file, if it cannot be read or is not that.
    """
    try:
        data = read_bytes(path, LARGEST_JSON)
    except OSError as error:
        raise UserError(f"{path} must be {what}, and cannot be read: {error.strerror or error}") from error
    return parse_json(data, f"{path}", what, kind, needs)


def parse_json(
    data: bytes | str, source: str, what: str, kind: type[Json] = dict, needs: Iterable[str] = ()
) -> Json:
    """`read_json` for what has been read already; `source` names it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} must be {what}, and is no JSON: {in_one_line(error)}") from error
    if not isinstance(content, kind):
        name = {dict: "object", list: "list"}[kind]
        raise UserError(f"{source} must be {what}, a JSON {name}, and is {type(content).__name__}")
    missing = [name for name in needs if name not in content]
    if missing:
        raise UserError(f"{source} must be {what}, and has no {missing[0]!r}")
    return content
