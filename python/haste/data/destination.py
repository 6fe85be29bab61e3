"""The folder that `haste prepare` fills, in REPA's layout: what is there, what is missing, what belongs to whom."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from haste.data.repa_layout import IMAGES, LATENTS, RECORD, image_name, latent_name
from haste.data.sources import LABEL_FILE, PictureSource
from haste.errors import UserError
from haste.io import holds_nothing, read_json, remove_leftovers, require_space, told, write_atomically, write_json
from haste.lock import hold
from haste.vae import LatentFormat

logger = logging.getLogger(__name__)


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG without compression, as REPA's, which every step of training decodes. pixels: (3, R, R) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, format="PNG", compress_level=0)
    return file.getvalue()


def encode_npy(moments: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, moments)
    return file.getvalue()


@dataclass(frozen=True)
class Kind:
    """One of the two folders: the name of each file in it, and the size of them all, by which a whole one is known."""

    folder: str
    file_name: Callable[[int], str]
    file_size: int


class Destination:
    """A folder that belongs to one source and its settings. UserError if it holds anything else.

    latents: None for pictures alone.
    """

    def __init__(self, path: Path, source: PictureSource, resolution: int, latents: LatentFormat | None) -> None:
        self.path = path
        self.count = len(source)
        self.class_names = source.class_names
        self.settings = {
            "resolution": resolution,
            "latents": None if latents is None else asdict(latents),
            "pictures": len(source),
            "source": source.digest(),
        }
        blank = encode_png(np.zeros((3, resolution, resolution), dtype=np.uint8))
        self.kinds = [Kind(IMAGES, image_name, len(blank))]
        if latents is not None:
            side = latents.input_size(resolution)
            empty = encode_npy(np.zeros((2 * latents.channels, side, side), dtype=np.float32))
            self.kinds.append(Kind(LATENTS, latent_name, len(empty)))
        self.finished = self._check_owner()

    def _check_owner(self) -> bool:
        """Whether an earlier command has finished here."""
        record = self.path / RECORD
        if not record.is_file():
            if not holds_nothing(self.path):
                raise UserError(f"--dest is {self.path}, which holds something else; give a new or an empty folder")
            return False
        saved = read_json(record, "the record of haste prepare", needs=["finished"])
        wanted = json.loads(json.dumps(self.settings))
        other = [name for name in wanted if saved.get(name) != wanted[name]]
        if other:
            raise UserError(
                f"--dest is {self.path}, which belongs to a command with other {', '.join(other)}; give another folder"
            )
        return saved["finished"] is True

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While this context is open no other command fills the folder; UserError if one does."""
        with hold(self.path, f"--dest {self.path} is being filled"):
            self.finished = self._check_owner()  # another command may have ended here a moment ago
            yield

    def claim(self) -> None:
        """Make the folder this command's, and remove what a kill in the middle of a write has left."""
        with told_in_one_line(self.path):
            self._write_record(finished=False)
            remove_leftovers(self.path)

    def _write_record(self, finished: bool) -> None:
        write_json(self.path / RECORD, {**self.settings, "class_names": self.class_names, "finished": finished})

    def present(self, kind: Kind) -> set[int]:
        """The numbers of the whole files. One cut short, by a power failure for instance, has another size."""
        sizes = {}
        for folder in (self.path / kind.folder).glob("[0-9]*"):
            with os.scandir(folder) as entries:
                sizes |= {f"{folder.name}/{entry.name}": entry.stat().st_size for entry in entries}
        return {number for number in range(self.count) if sizes.get(kind.file_name(number)) == kind.file_size}

    def missing(self, share: Iterable[int]) -> list[int]:
        """Those of these numbers of which a file is missing."""
        whole = set.intersection(*map(self.present, self.kinds))
        return [number for number in share if number not in whole]

    def write(self, kind: Kind, number: int, data: bytes) -> None:
        """One file, whole or not at all after a kill. It is not pushed to the disk, which would take longer than all
        the rest: after a power failure its size tells."""
        path = self.path / kind.folder / kind.file_name(number)
        write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)

    def finish(self, labels: np.ndarray | None) -> None:
        """Write dataset.json of both folders, for the pictures of which every file is there."""
        numbers = sorted(set.intersection(*map(self.present, self.kinds)))
        if not numbers:
            raise UserError(f"--dest is {self.path}, and none of the {self.count} pictures of --source can be read")
        with told_in_one_line(self.path):
            for kind in self.kinds:
                names = map(kind.file_name, numbers)
                listed = None if labels is None else list(zip(names, labels[numbers].tolist(), strict=True))
                write_json(self.path / kind.folder / LABEL_FILE, {"labels": listed}, indent=None)
            self._write_record(finished=True)

    def check_space(self, pack: bool) -> None:
        """UserError if the disk has no room for what is missing and, to pack, for the larger folder once more."""
        block = 4096  # a file takes whole blocks
        sizes = [-(-kind.file_size // block) * block for kind in self.kinds]
        needed = len(self.missing(range(self.count))) * sum(sizes) + (self.count * max(sizes) if pack else 0)
        try:
            require_space(self.path, needed, "what is missing")
        except OSError as error:
            raise UserError(f"--dest must have more room: {error}") from error

    def pack(self) -> None:
        """Turn each folder into a zip beside it, stored without compression."""
        remove_leftovers(self.path)
        for kind in self.kinds:
            folder, packed = self.path / kind.folder, self.path / f"{kind.folder}.zip"
            if not packed.is_file():
                logger.info("packing %s", packed)
                with told_in_one_line(self.path):
                    write_atomically(packed, lambda temporary, folder=folder: _zip_folder(folder, temporary))
            shutil.rmtree(folder, ignore_errors=True)


def told_in_one_line(path: Path) -> AbstractContextManager[None]:
    """UserError for a disk that is full or cannot be written."""
    return told(f"--dest is {path}, which", "what is there is kept, and the same command goes on")


def _zip_folder(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.write(path, path.relative_to(folder).as_posix())
