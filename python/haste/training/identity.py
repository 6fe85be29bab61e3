"""Which checkpoint something was measured or drawn from: its name and a digest of its content.

Copies have the same digest, and so has a file that was only touched; one that was trained again has another.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste.errors import UserError, in_one_line

DIGEST = "checkpoint_digest"
WRITTEN = "checkpoint_written"  # nanoseconds since 1970, by which earlier versions' records know a checkpoint

PIECES = 64  # read of a file that has no checksums of its own, from its beginning to its end
PIECE = 2**16  # bytes


def checkpoint_identity(path: Path) -> dict[str, Any]:
    """The fields by which a record knows a checkpoint. UserError if the file cannot be read."""
    return {"checkpoint": path.name, DIGEST: content_digest(path)}


def as_before(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A record with `checkpoint_identity` of `path`, as earlier versions wrote it."""
    fields = {name: value for name, value in record.items() if name != DIGEST}
    return {**fields, WRITTEN: path.stat().st_mtime_ns}


def content_digest(path: Path) -> str:
    """12 hexadecimal digits that tell a checkpoint's content, without reading all of it.

    Of torch.save's zip files the names, sizes and checksums of all entries, which are together at the end. Of others
    the size and PIECES pieces, evenly spaced: of a file of up to 4 MiB all of it.
    Raises UserError if it is no file, or cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise UserError(f"the checkpoint {path} does not exist")
        content = _entries(path) or _pieces(path)
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or in_one_line(error)}") from error
    return hashlib.sha256(content).hexdigest()[:12]


def _entries(path: Path) -> bytes:
    """Of a zip file; empty of another, or if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save puts all into a folder called as the file was when it was written, which tells nothing.
            entries = [(each.filename.partition("/")[2], each.file_size, each.CRC) for each in archive.infolist()]
    except OSError:
        raise
    except Exception:  # a damaged archive leads zipfile to raise anything; reading the weights will say what it is
        return b""
    return repr(entries).encode()


def _pieces(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - PIECE, 0)
        for number in range(PIECES):
            file.seek(last * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return f"{size} {digest.hexdigest()}".encode()
