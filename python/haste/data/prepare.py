"""From any images to REPA's layout: cropped PNGs, the moments of their latents, and their labels.

Image number i of the source becomes file number i, so that a command that was killed resumes with the numbers that are
missing, and a file that cannot be used leaves a gap. Worker processes read, crop and write PNGs; the process itself
encodes.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from haste.data.dataset import to_unit
from haste.data.images import center_crop, decode_image
from haste.data.load import IMAGES, LATENTS, RECORD, image_name, latent_name
from haste.data.loader import leave_signals_to_the_parent, prefetch, useful_workers
from haste.data.sources import LABEL_FILE, ImageSource
from haste.errors import BadFile, OnBadFile, UserError
from haste.io import require_space, write_atomically, write_json
from haste.resumable import ResumableDir
from haste.vae import VAE, LatentFormat

logger = logging.getLogger(__name__)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (3, R, R) uint8 as a PNG without compression, as REPA's, since every step of training decodes it."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, format="PNG", compress_level=0)
    return file.getvalue()


def encode_npy(moments: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, moments)
    return file.getvalue()


@dataclass(frozen=True)
class Kind:
    """One of the two folders: the name of each file, and the size of every whole one."""

    folder: str
    file_name: Callable[[int], str]
    file_size: int


class Destination(ResumableDir):
    """The folder that `haste prepare` fills, for one source and its settings.

    Args:
        latents: None for images alone.
    """

    flag, content, record_name = "--dest", "training data", RECORD

    def __init__(self, path: Path, source: ImageSource, resolution: int, latents: LatentFormat | None) -> None:
        self.count = len(source)
        self.class_names = source.class_names
        blank = encode_png(np.zeros((3, resolution, resolution), dtype=np.uint8))
        self.kinds = [Kind(IMAGES, image_name, len(blank))]
        if latents is not None:
            side = latents.input_size(resolution)
            empty = encode_npy(np.zeros((2 * latents.channels, side, side), dtype=np.float32))
            self.kinds.append(Kind(LATENTS, latent_name, len(empty)))
        settings = {
            "resolution": resolution,
            "latents": None if latents is None else asdict(latents),
            "images": len(source),
            "source": source.digest(),
        }
        super().__init__(path, settings)

    @property
    def finished(self) -> bool:
        """Whether an earlier command has finished here."""
        return self.saved is not None and self.saved.get("finished") is True

    def create(self) -> None:
        """Make the folder this command's, without what a kill in the middle of a write has left."""
        self._write(finished=False)
        self.remove_leftovers()

    def _write(self, finished: bool) -> None:
        self.write_record({**self.settings, "class_names": self.class_names, "finished": finished})

    def present(self, kind: Kind) -> set[int]:
        """The numbers of the whole files. One cut short, by a power failure for instance, has another size."""
        sizes: dict[str, int] = {}
        for folder in (self.path / kind.folder).glob("[0-9]*"):
            with os.scandir(folder) as entries:
                sizes |= {f"{folder.name}/{entry.name}": entry.stat().st_size for entry in entries}
        return {number for number in range(self.count) if sizes.get(kind.file_name(number)) == kind.file_size}

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of these numbers of which a file is missing."""
        whole = set.intersection(*map(self.present, self.kinds))
        return [number for number in numbers if number not in whole]

    def write(self, kind: Kind, number: int, data: bytes) -> None:
        """Write one file, whole or not at all after a kill. It is not pushed to the disk, which would take longer than
        all the rest: after a power failure its size shows."""
        path = self.path / kind.folder / kind.file_name(number)
        write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)

    def finish(self, labels: np.ndarray | None) -> None:
        """Write dataset.json of both folders, for the images of which every file is there."""
        numbers = sorted(set.intersection(*map(self.present, self.kinds)))
        if not numbers:
            raise UserError(f"--source must hold images that can be read, got {self.count} of which none can")
        with self.writing():
            for kind in self.kinds:
                names = map(kind.file_name, numbers)
                listed = None if labels is None else list(zip(names, labels[numbers].tolist(), strict=True))
                write_json(self.path / kind.folder / LABEL_FILE, {"labels": listed}, indent=None)
        self._write(finished=True)

    def check_space(self, pack: bool) -> None:
        """Raise UserError if the disk has no room for what is missing and, to pack, for the larger folder once more."""
        block = 4096  # a file takes whole blocks
        sizes = [-(-kind.file_size // block) * block for kind in self.kinds]
        needed = len(self.missing(range(self.count))) * sum(sizes) + (self.count * max(sizes) if pack else 0)
        try:
            require_space(self.path, needed, "what is missing")
        except OSError as error:
            raise UserError(f"--dest must have more room: {error}") from error

    def pack(self) -> None:
        """Turn each folder into a zip beside it, stored without compression."""
        self.remove_leftovers()
        for kind in self.kinds:
            folder, packed = self.path / kind.folder, self.path / f"{kind.folder}.zip"
            if not packed.is_file():
                logger.info("packing %s", packed)
                with self.writing():
                    write_atomically(packed, functools.partial(_zip_folder, folder))
            shutil.rmtree(folder, ignore_errors=True)


def _zip_folder(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.write(path, path.relative_to(folder).as_posix())


class Cropped(NamedTuple):
    """number: of the image; pixels: (3, R, R) uint8; problem: why there are none, or why they were not written."""

    number: int
    pixels: Tensor | None
    problem: BadFile | UserError | None


class _CropAndWrite:
    """Runs in worker processes. Errors are values: DataLoader would wrap an exception into a page of traceback."""

    def __init__(self, source: ImageSource, destination: Destination, resolution: int) -> None:
        self.source = source
        self.destination = destination
        self.resolution = resolution

    def __getitem__(self, number: int) -> Cropped:
        try:
            image = decode_image(self.source.read(number), self.source.name(number))
            pixels = center_crop(image, self.resolution)
            with self.destination.writing():
                self.destination.write(self.destination.kinds[0], number, encode_png(pixels))
        except (BadFile, UserError) as problem:
            return Cropped(number, None, problem)
        return Cropped(number, torch.from_numpy(pixels), None)


@dataclass
class Preparation:
    """One process's part of a command. vae: None for images alone; faults: the files that were skipped."""

    source: ImageSource
    destination: Destination
    resolution: int
    vae: VAE | None
    batch_size: int
    num_workers: int
    on_bad_file: OnBadFile

    def __post_init__(self) -> None:
        self.faults: list[BadFile] = []

    def run(self, numbers: list[int]) -> Iterator[int]:
        """Write the files of these numbers, and yield the size of each batch that is done.

        Raises:
            UserError: a bad file may not be skipped, or the disk cannot be written.
        """
        for batch in self._cropped(numbers):
            for problem in (cropped.problem for cropped in batch if cropped.problem is not None):
                if isinstance(problem, UserError):
                    raise problem
                if self.on_bad_file == "refuse":
                    raise problem.as_user_error() from problem
                self.faults.append(problem)
                logger.warning("skipped: %s (%d so far)", problem, len(self.faults))
            self._encode([cropped for cropped in batch if cropped.problem is None])
            yield len(batch)

    def _cropped(self, numbers: list[int]) -> Iterator[list[Cropped]]:
        loader = DataLoader(
            _CropAndWrite(self.source, self.destination, self.resolution),
            sampler=numbers,
            batch_size=self.batch_size,
            num_workers=useful_workers(self.num_workers, math.ceil(len(numbers) / self.batch_size)),
            collate_fn=list,
            worker_init_fn=leave_signals_to_the_parent,
        )
        return prefetch(loader)

    def _encode(self, images: list[Cropped]) -> None:
        if self.vae is None or not images:
            return
        pixels = torch.stack([image.pixels for image in images]).to(self.vae.device)
        moments = self.vae.encode(to_unit(pixels)).cpu().numpy()
        with self.destination.writing():
            for image, array in zip(images, moments, strict=True):
                self.destination.write(self.destination.kinds[1], image.number, encode_npy(array))
