"""Files: atomic writes, reads within limits, JSON from any source; and access to the Hugging Face hub."""

from __future__ import annotations

import errno
import functools
import glob
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line

# Limits of files, checked before memory is allocated.
LARGEST_JSON = 256 * 2**20  # bytes; the labels of ImageNet take 60 MB
LARGEST_FILE = 2**30  # bytes of one image or its latents, also inside a zip
MOST_PIXELS = 100_000_000  # of one image: 400 MB in memory
MOST_ELONGATED = 100  # longer side over shorter side; the crop first scales the shorter one to --resolution
LARGEST_ARRAY = 16 * 2**30  # bytes; ImageNet in 2,048 features takes 10.5 GB
SMALL_ARRAY = 64 * 2**20  # bytes; smaller arrays may be compressed at any ratio
MOST_INFLATION = 100  # bytes of a larger array per byte in the file
MOST_CLASSES = 1_000_000  # rows of the label table: 4.6 GB at a width of 1,152, and four times that in training
LARGEST_HEADER = 2**16  # bytes of an array's header


def in_bytes(size: int) -> str:
    """Format a number of bytes, such as 1.5 GiB."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size} bytes"


LOCK = ".lock"  # in a folder that a command of haste.resumable holds

ABANDONED = 3600  # seconds without a write, after which a temporary file of another machine counts as abandoned

# The name of a file or folder before it is complete, with the process that writes it.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def temporary_path(path: Path) -> Path:
    """.NAME.PID.tmp in the same folder: the name of a file or folder while this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, write: Callable[[Path], Any], durable: bool = True) -> None:
    """Write a file by `write(temporary path)`, then rename it: a kill, and with `durable` a power failure, leaves the
    old or the new file. Raises OSError.
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
        os.fsync(folder)  # of the new name
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, and remove abandoned temporary files of the same file."""
    remove_abandoned(path)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def save_tensors(path: Path, content: Any) -> None:
    """Call torch.save atomically. Equal content gives equal bytes, in any process."""
    import torch  # imported here, as it takes seconds and few commands need it

    def write(temporary: Path) -> None:
        try:
            with open(temporary, "wb") as file:  # given a path, torch would write its name, with the process, inside
                torch.save(_without_shared_parts(content), file)
        except RuntimeError as error:  # raised by torch for a full disk
            raise OSError(in_one_line(error)) from error

    write_atomically(path, write)


def _without_shared_parts(value: Any) -> Any:
    """The same value with one object for equal strings and new containers: pickle writes an object that it has met
    before in another way than an equal one, and which are one object depends on how the process came by them.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is Namespace:
        return Namespace(**_without_shared_parts(vars(value)))
    if type(value) is dict:
        return {_without_shared_parts(key): _without_shared_parts(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_shared_parts, value))
    return value


@contextmanager
def writing(what: str, kept: str = "") -> Iterator[None]:
    """Convert an OSError of a write to a UserError that begins with `what` and ends with `kept`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or in_one_line(error)
        raise UserError(f"{what} cannot be written: {reason}" + (f"; {kept}" if kept else "")) from error


def is_leftover(path: Path) -> bool:
    """Whether a path is an unfinished file or folder."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files in a folder and its subfolders. Only for a command that holds the folder's lock."""
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path):
            _remove(path)


def remove_abandoned(path: Path, held: bool = False) -> None:
    """Delete unfinished versions of a file; those that another process may be writing only if the lock is `held`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_leftover(leftover) and (held or not _is_being_written(leftover) and _age(leftover) > ABANDONED):
            _remove(leftover)


def _is_being_written(leftover: Path) -> bool:
    """Whether the process in its name is running on this machine. Its number may be ours, as numbers are reused."""
    writer = int(leftover.name.rsplit(".", 2)[1])
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
    """Seconds since the last write; 0 if it does not exist."""
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
    """Whether a path does not exist, or is a folder with nothing but unfinished files."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(is_leftover(path) or path.name == LOCK for path in folder.iterdir())


def require_space(folder: Path, size: int, what: str = "a checkpoint") -> None:
    """Raise OSError if fewer than `size` bytes are free on the disk of `folder`, which need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(f"{folder} has {in_bytes(free)} free, and {what} takes {in_bytes(size)}")


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError for any other."""
    try:
        status = os.stat(path)
    except ValueError as error:  # NUL in the name
        raise OSError(errno.EINVAL, in_one_line(error), str(path)) from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
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
    """Read a JSON object with the keys `needs`. Raises UserError, naming the file and `what` it must be."""
    try:
        data = read_bytes(path, LARGEST_JSON)
    except OSError as error:
        raise UserError(f"{path} must be {what}, but cannot be read: {error.strerror or error}") from error
    return parse_json(data, str(path), what, needs)


def parse_json(data: bytes | str, source: str, what: str, needs: Iterable[str] = ()) -> dict[str, Any]:
    """As `read_json`, for data that `source` names."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} must be {what}, but is no JSON: {in_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} must be {what}, a JSON object, got {type(content).__name__}")
    for name in needs:
        if name not in content:
            raise UserError(f"{source} must be {what}, but has no {name!r}")
    return content


# ---- the Hugging Face hub ----

HUB_PATIENCE = 2.0  # seconds; the hub's library would try for half a minute


@functools.cache
def is_reachable() -> bool:
    """Whether the hub, or the mirror that its library is configured with, answers within `HUB_PATIENCE`."""
    answered = []

    def request() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)  # raises with HF_HUB_OFFLINE
        except Exception:  # the library that raises depends on the version
            return
        answered.append(True)

    # In a thread, since the timeout does not cover DNS.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return bool(answered)


def loading_arguments(source: str) -> dict[str, Any]:
    """The arguments of from_pretrained() that avoid the hub for a folder, and if the hub does not answer."""
    return {"local_files_only": Path(source).is_dir() or not is_reachable()}


def require_source(name: str, source: str, flag: str) -> None:
    """Raise UserError unless `source` is a folder, is in the hub's cache, or the hub answers."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return
    if os.path.isabs(source) or source.count("/") > 1:  # no name on the hub: a folder that has moved
        raise UserError(f"{flag} must be a folder of save_pretrained(), or a name on the hub, got {name}, which does "
                        "not exist")  # fmt: skip
    if is_reachable() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    raise UserError(
        f"{flag} must be a folder of save_pretrained(), or a downloaded name, as the hub cannot be reached (or "
        f"HF_HUB_OFFLINE is set), got {name}"
    )
