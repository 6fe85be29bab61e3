"""The folder that `haste sample` fills: numbered PNGs, and sample.json with the command that they belong to.

A folder takes pictures of one command only. Since a picture depends on its number alone, a command that was killed
goes on with the numbers that are missing, and a larger count adds to what is there.

    <name>/000000.png ...   the pictures, in their own size
    <name>/sample.json      settings, and the seconds that drawing took
    <name>.npz              arr_0 (N, H, W, 3) uint8 as the ADM evaluator reads it, and labels (N,)
    <name>-grid.png         some of them, enlarged, with their labels
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError
from haste.evaluation.images import picture_path, read_pictures, write_npz, write_picture
from haste.training.checkpoint import write_atomically

RECORD = "sample.json"


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

    Nothing is written before the first picture. Raises UserError if the folder holds anything but samples with exactly
    these settings.
    """

    path: Path
    settings: dict[str, Any]
    drawn: Drawn = field(default_factory=Drawn)

    def __post_init__(self) -> None:
        record = self.path / RECORD
        if record.is_file():
            saved = read_record(self.path)
            self._refuse_other(saved["settings"])
            self.drawn = Drawn(**saved["drawn"])
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} holds something else than samples; give another --sample-dir")

    def _refuse_other(self, saved: dict[str, Any]) -> None:
        names = list(dict.fromkeys([*saved, *self.settings]))
        differences = [
            f"{name} {saved.get(name, 'unset')}, now {self.settings.get(name, 'unset')}"
            for name in names
            if saved.get(name) != self.settings.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.path} holds the samples of another command ({'; '.join(differences[:3])}); "
                "give another --sample-dir, or remove it"
            )

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` whose picture is not there yet."""
        return [index for index in range(count) if not picture_path(self.path, index).is_file()]

    def add(self, indices: list[int], images: np.ndarray, seconds: float, evaluations: int, full: int) -> None:
        """Write one batch (n, H, W, 3) uint8 and what it took."""
        self._save()  # claims the folder before the first picture is in it
        for index, image in zip(indices, images, strict=True):
            write_picture(picture_path(self.path, index), image)
        self.drawn = Drawn(self.drawn.pictures + len(indices), self.drawn.seconds + seconds, evaluations, full)
        self._save()

    def collect(self, count: int, labels: np.ndarray) -> np.ndarray:
        """The first `count` pictures (count, H, W, 3) uint8; writes the .npz with their labels beside the folder."""
        images = read_pictures(self.path)[:count]
        write_npz(self.npz, images, labels)
        return images

    @property
    def npz(self) -> Path:
        return self.path.with_name(self.path.name + ".npz")

    @property
    def grid(self) -> Path:
        return self.path.with_name(self.path.name + "-grid.png")

    def _save(self) -> None:
        text = json.dumps({"settings": self.settings, "drawn": asdict(self.drawn)}, indent=2) + "\n"
        try:
            write_atomically(self.path / RECORD, lambda temporary: temporary.write_text(text))
        except OSError as error:
            raise UserError(f"the sample folder {self.path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Samples:
    """What a command of `haste sample` left: pictures (N, H, W, 3) uint8, their labels (N,), and the folder."""

    images: np.ndarray
    labels: np.ndarray
    folder: SampleFolder

    @property
    def drawn(self) -> Drawn:
        return self.folder.drawn


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a folder's sample.json: settings and drawn. Raises UserError if it is not one."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return {"settings": dict(record["settings"]), "drawn": dict(record["drawn"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} cannot be read as the record of a sample folder ({error})") from error
