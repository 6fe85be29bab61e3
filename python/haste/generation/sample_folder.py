"""The folder that `haste sample` fills: numbered PNGs, and sample.json with the command that they belong to.

A folder takes pictures of one command only. Since a picture depends on its number alone, a command that was killed
goes on with the numbers that are missing, and a larger count adds to what is there.

    <name>/000000.png ...   the pictures, in their own size
    <name>/sample.json      settings, the seconds that drawing took, and full steps that were measured
    <name>.npz              arr_0 (N, H, W, 3) uint8 as the ADM evaluator reads it, and labels (N,)
    <name>-grid.png         some of them, enlarged, with their labels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError, shorten
from haste.evaluation.images import picture_path, read_picture, write_npz, write_picture
from haste.io import holds_nothing, read_json, remove_abandoned, remove_leftovers, told, write_json
from haste.lock import hold
from haste.plain import build
from haste.training.identity import DIGEST, WRITTEN

RECORD = "sample.json"

THREADS = 8  # files that are read or written at a time
ALL_THERE = "the images are all there, and the same command tries again"

CHUNK = 256  # pictures in memory while the .npz is written


@dataclass
class Drawn:
    """What was drawn into a folder so far, the seconds it took, and how often the model was evaluated for a picture."""

    pictures: int = 0
    seconds: float = 0.0
    evaluations_per_picture: int = 0
    full_per_picture: int = 0

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / self.seconds if self.seconds else 0.0


@dataclass
class SampleFolder:
    """A folder of samples that belongs to `settings`, a dictionary of plain values.

    full_steps: those that --max-error has found, which hold for all pictures of the folder.
    before: the settings as earlier versions recorded them (`as_before`), so that their folders are gone on with.

    Nothing is written before the first picture. Raises UserError if the folder holds anything but samples with exactly
    these settings.
    """

    path: Path
    settings: dict[str, Any]
    drawn: Drawn = field(default_factory=Drawn)
    full_steps: list[int] | None = None
    before: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        record = self.path / RECORD
        if record.is_file():
            saved = read_record(self.path)
            self._refuse_other(saved.settings)
            self.drawn, self.full_steps = saved.drawn, saved.full_steps
        elif not holds_nothing(self.path):
            raise UserError(f"{self.path} holds something else than samples; give another --sample-dir")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While this context is open no other command fills the folder; what a kill has left of a write is gone.

        UserError if another command does.
        """
        with hold(self.path, f"{self.path} is being filled", "give another --sample-dir, or wait until it has ended"):
            self.__post_init__()  # another command may have ended here a moment ago
            remove_leftovers(self.path)
            for path in (self.npz, self.grid):
                remove_abandoned(path, held=True)
            yield

    def _refuse_other(self, saved: dict[str, Any]) -> None:
        own = self.before if self.before is not None and WRITTEN in saved else self.settings
        names = dict.fromkeys([*saved, *own])
        differences = [_difference(name, saved, own) for name in names if saved.get(name) != own.get(name)]
        if differences:
            raise UserError(
                f"{self.path} holds the samples of another command ({'; '.join(differences[:3])}); "
                "give another --sample-dir, or remove it"
            )

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` whose picture is not there yet."""
        return [index for index in range(count) if not picture_path(self.path, index).is_file()]

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write pictures (n, H, W, 3) uint8 under these numbers; any process may."""
        if not (self.path / RECORD).is_file():
            self._save()  # claims the folder before the first picture is in it
        paths = [picture_path(self.path, index) for index in indices]
        with self._told(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write_picture, paths, images))

    def count(self, pictures: int, seconds: float, evaluations: int, full: int) -> None:
        """Keep in the record that so many pictures more were written, and what they took."""
        self.drawn = Drawn(self.drawn.pictures + pictures, self.drawn.seconds + seconds, evaluations, full)
        self._save()

    def read(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` pictures, (H, W, 3) uint8 each. Raises UserError if one cannot be read."""
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, count, CHUNK):
                numbers = range(start, min(start + CHUNK, count))
                yield from pool.map(read_picture, [picture_path(self.path, number) for number in numbers])

    def collect(self, labels: np.ndarray) -> None:
        """Write the .npz with the first pictures and their labels (N,) beside the folder. UserError if it cannot be."""
        with told(str(self.npz), ALL_THERE):
            write_npz(self.npz, self.read(len(labels)), labels)

    @property
    def npz(self) -> Path:
        return self.path.with_name(self.path.name + ".npz")

    @property
    def grid(self) -> Path:
        return self.path.with_name(self.path.name + "-grid.png")

    def _save(self) -> None:
        record = {"settings": self.settings, "drawn": asdict(self.drawn)}
        if self.full_steps is not None:
            record["full_steps"] = self.full_steps
        with self._told():
            write_json(self.path / RECORD, record)

    def _told(self) -> AbstractContextManager[None]:
        return told(f"the sample folder {self.path}", "what is there is kept, and the same command goes on")


def _difference(name: str, saved: dict[str, Any], own: dict[str, Any]) -> str:
    if name == WRITTEN:
        return "the checkpoint was written again"
    shown = "the checkpoint's content" if name == DIGEST else name
    return f"{shown} {shorten(saved.get(name, 'unset'))}, now {shorten(own.get(name, 'unset'))}"


@dataclass(frozen=True)
class Samples:
    """What a command of `haste sample` left: pictures with their labels (N,), and the folder.

    new: how many of them this command sampled; the others were there.
    """

    labels: np.ndarray
    folder: SampleFolder
    new: int

    @cached_property
    def images(self) -> np.ndarray:
        """All of them in memory, (N, H, W, 3) uint8."""
        return np.stack(list(self.folder.read(len(self.labels))))

    @property
    def drawn(self) -> Drawn:
        return self.folder.drawn


@dataclass(frozen=True)
class Record:
    """The content of a sample.json. full_steps: those that --max-error has found."""

    settings: dict[str, Any]
    drawn: Drawn
    full_steps: list[int] | None = None


def read_record(folder: Path) -> Record:
    """The content of a folder's sample.json. UserError if it is not one."""
    path = folder / RECORD
    return build(Record, read_json(path, "the record of a sample folder"), str(path))
