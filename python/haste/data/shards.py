"""The compact layout of images with captions: arrays in safetensors files, of which any row is read by itself.

    empty_context.npy             (tokens, width) float32: the features of the empty caption
    captions-00000.safetensors    features (n, tokens, width) float16 of captions that are all different; text, their
                                  UTF-8 end to end, and ends (n,) in it
    images-00000.safetensors      number (n,), which counts the images of the source; pixels (n, 3, R, R) uint8;
                                  moments (n, 2C, S, S) float32: mean and log-variance; captions (m,): rows among all
                                  captions, image after image, and ends (n,) in it

A shard is written whole or not at all. Shard number s has the captions, or the images of the source, from s·n on, with
n = per_shard of the record; images that could not be read are left out.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from haste.data.archive import Folder
from haste.data.caption_store import CaptionStore, read_null, require_finished
from haste.data.dataset import fingerprint
from haste.data.record import RECORD, read_record
from haste.data.sources import check_missing
from haste.errors import BadFile, OnBadFile, UserError, in_one_line
from haste.io import write_atomically
from haste.validation import check, shown

logger = logging.getLogger(__name__)

T = TypeVar("T")

CAPTIONS_PER_SHARD, IMAGES_PER_SHARD = 1024, 256
MOST_OPEN = 256  # shards of a process


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """Of a shard of "captions" or "images"."""
    return folder / f"{kind}-{number:05d}.safetensors"


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a shard atomically. Raises OSError."""
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def is_sharded(record: dict[str, Any]) -> bool:
    """Whether a folder with this record has this layout."""
    return record.get("layout") == "shards"


class ShardFiles:
    """Open shards. They are mapped into memory, and each process opens them for itself.

    Args:
        framework: of the arrays, numpy or pt; numpy has no bfloat16.
    """

    def __init__(self, framework: str = "numpy") -> None:
        self._framework = framework
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_framework": self._framework, "_open": OrderedDict()}

    def array(self, path: Path, name: str, rows: Any = slice(None)) -> Any:
        """Some rows of an array, or all. Raises BadFile for a file that is missing or damaged, or has no such rows."""
        return self._read(path, name, lambda array: array[rows])

    def shape(self, path: Path, name: str) -> tuple[int, ...]:
        """Of an array, from the header. Raises BadFile as `array`."""
        return tuple(self._read(path, name, lambda array: array.get_shape()))

    def _read(self, path: Path, name: str, use: Callable[[Any], T]) -> T:
        try:
            return use(self._file(path).get_slice(name))
        except FileNotFoundError as error:
            raise BadFile(str(path), "is missing") from error
        except Exception as error:  # safetensors raises its own and others for a damaged file
            raise BadFile(str(path), f"has no readable {name} ({in_one_line(error)})") from error

    def has(self, path: Path, name: str) -> bool:
        """Whether a readable shard has an array."""
        return name in self._file(path).keys()  # noqa: SIM118, it is no dictionary

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework=self._framework).__enter__()
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


class Shards(CaptionStore):
    """Images with captions in the compact layout.

    Raises:
        UserError: the folder is not finished, or with "refuse" has missing, extra or damaged shards.
    """

    def __init__(self, path: Path, flag: str, on_bad_file: OnBadFile = "refuse") -> None:
        self.path = path
        root = Folder(path)
        self.record = read_record(root)
        require_finished(self.record, str(path), flag)
        self.text, self.null = read_null(self.record, [root], flag)
        where = root.locate(RECORD)
        counts = {name: check(self.record.get(name), int, f"{name} of {where}") for name in ("images", "captions")}
        per_shard = check(self.record.get("per_shard"), dict[str, int], f"per_shard of {where}")
        if not all(per_shard.get(kind, 0) > 0 for kind in counts):
            raise UserError(f"per_shard of {where} must be numbers from 1, got {shown(per_shard)}")
        self._per_shard = per_shard
        self._shards = {kind: -(-count // per_shard[kind]) for kind, count in counts.items()}
        self._check_names(on_bad_file)
        self._files = ShardFiles()
        self._read_index(flag, counts["captions"], on_bad_file)

    def _check_names(self, on_bad_file: OnBadFile) -> None:
        wanted = {shard_path(self.path, kind, n) for kind, count in self._shards.items() for n in range(count)}
        found = {path for kind in self._shards for path in self.path.glob(f"{kind}-*.safetensors")}
        missing, extra = sorted(map(str, wanted - found)), sorted(map(str, found - wanted))
        check_missing(f"{len(missing)} shards of {self.path} are missing", missing, on_bad_file)
        other = f"{len(extra)} shards in {self.path} are not among those of {RECORD}"
        check_missing(other, extra, on_bad_file, "remove them")

    def _read_index(self, flag: str, captions: int, on_bad_file: OnBadFile) -> None:
        """Where each image is, and which captions it has."""
        shards: list[int] = []
        rows: list[int] = []
        ends, chosen, faults = [0], [], []
        for number in range(self._shards["images"]):
            path = shard_path(self.path, "images", number)
            try:
                last, own = self._files.array(path, "ends"), self._files.array(path, "captions")
                held = len(self._files.array(path, "number"))
                counts = np.diff(last, prepend=0)
                if len(last) != held or counts.min(initial=1) < 1 or (last[-1:] != len(own)).any():
                    raise BadFile(str(path), "has captions that are not those of its images")
                if ((own < 0) | (own >= captions)).any():
                    raise BadFile(str(path), f"must have captions from 0 to {captions - 1}, got others")
            except BadFile as fault:
                faults.append(fault)
                continue
            shards += [number] * held
            rows += range(held)
            ends += (last + ends[-1]).tolist()
            chosen.append(own)
        if faults and on_bad_file == "refuse":
            raise faults[0].as_user_error()
        for fault in faults:
            logger.warning("skipped: %s", fault)
        if not shards:
            raise UserError(f"{flag} must hold images, got none in the shards of {self.path}")
        self._shard, self._row = np.array(shards, dtype=np.int32), np.array(rows, dtype=np.int32)
        self._ends, self._captions = np.array(ends), np.concatenate(chosen)
        self.has_moments = self._files.has(self._place(0), "moments")

    def __len__(self) -> int:
        return len(self._shard)

    def _place(self, index: int) -> Path:
        return shard_path(self.path, "images", int(self._shard[index]))

    def name(self, index: int) -> str:
        return f"image {self._row[index]} of {self._place(index)}"

    def pixels(self, index: int) -> np.ndarray:
        return self._files.array(self._place(index), "pixels", int(self._row[index]))

    def moments(self, index: int) -> np.ndarray:
        return self._files.array(self._place(index), "moments", int(self._row[index]))

    def count(self, index: int) -> int:
        return int(self._ends[index + 1] - self._ends[index])

    def features(self, index: int, choice: int) -> np.ndarray:
        path, row = self._caption(index, choice)
        features = self._files.array(path, "features", row)
        if features.shape != self.text.shape:
            found = " x ".join(map(str, features.shape))
            raise BadFile(str(path), f"must hold features of {self.text.tokens} x {self.text.width}, got {found}")
        return features

    def sentence(self, index: int, choice: int) -> str | None:
        path, row = self._caption(index, choice)
        ends = self._files.array(path, "ends", slice(max(row - 1, 0), row + 1))
        start, stop = (0, int(ends[0])) if row == 0 else map(int, ends)
        return self._files.array(path, "text", slice(start, stop)).tobytes().decode("utf-8", "replace")

    def _caption(self, index: int, choice: int) -> tuple[Path, int]:
        """The shard of a caption, and the row in it."""
        shard, row = divmod(int(self._captions[self._ends[index] + choice]), self._per_shard["captions"])
        return shard_path(self.path, "captions", shard), row

    def fingerprint(self) -> dict[str, Any]:
        def read(index: int) -> bytes:
            moments = self.moments(index).tobytes() if self.has_moments else b""
            return self.pixels(index).tobytes() + moments + self.features(index, 0).tobytes()

        names = str(self.record.get("source")).encode() + self._shard.tobytes() + self._row.tobytes()
        return fingerprint(len(self), names + self._captions.tobytes(), None, read)
