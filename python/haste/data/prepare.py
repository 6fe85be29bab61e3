"""Conversion of any images to REPA's layout: cropped PNGs, the moments of their latents, and labels.

Image number i of the source becomes file number i: a killed command resumes with the missing numbers, and a file that
cannot be used leaves a gap. Worker processes read, crop and write PNGs; the main process encodes latents. The latents
of the mirror images may be added to a folder that is finished.
"""

from __future__ import annotations

import functools
import io
import logging
import operator
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from haste.data.dataset import to_unit
from haste.data.images import center_crop, decode_image
from haste.data.latent_folders import FLIP, IMAGES, LATENTS
from haste.data.latent_statistics import UNIT
from haste.data.latents import decode_moments
from haste.data.loader import leave_signals_to_the_parent, prefetch, useful_workers
from haste.data.record import RECORD
from haste.data.repa_layout import image_name, latent_name
from haste.data.sources import LABEL_FILE, ImageSource
from haste.errors import BadFile, OnBadFile, UserError
from haste.io import require_space, write_atomically, write_json
from haste.resumable import ResumableDir
from haste.vae import VAE, LatentFormat

logger = logging.getLogger(__name__)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (3, R, R) uint8 as an uncompressed PNG, as in REPA, since training decodes it at every use."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, format="PNG", compress_level=0)
    return file.getvalue()


def encode_npy(moments: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, moments)
    return file.getvalue()


class Kind(NamedTuple):
    """One of the folders: the names of its files, and their size when they are complete."""

    folder: str
    file_name: Callable[[int], str]
    file_size: int


class Destination(ResumableDir):
    """The output folder of `haste prepare`.

    Args:
        latents: None for images only.
        latents_dir: the name of their folder.
        flip: whether to write the latents of the mirror images as well.
    """

    flag, content, record_name = "--dest", "training data", RECORD

    def __init__(
        self,
        path: Path,
        source: ImageSource,
        resolution: int,
        latents: LatentFormat | None,
        latents_dir: str = LATENTS,
        flip: bool = False,
    ) -> None:
        self.count = len(source)
        self.class_names = source.class_names
        self.flip = flip
        blank = encode_png(np.zeros((3, resolution, resolution), dtype=np.uint8))
        self.kinds = {IMAGES: Kind(IMAGES, image_name, len(blank))}
        if latents is not None:
            side = latents.input_size(resolution)
            size = len(encode_npy(np.zeros((2 * latents.channels, side, side), dtype=np.float32)))
            self.kinds[LATENTS] = Kind(latents_dir, latent_name, size)
            if flip:
                self.kinds[FLIP] = Kind(latents_dir + FLIP, latent_name, size)
        settings = {
            "resolution": resolution,
            "latents": None if latents is None else asdict(latents),
            "images": len(source),
            "source": source.digest(),
            "latents_dir": latents_dir,
        }
        super().__init__(path, settings)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        return super().differences({"latents_dir": LATENTS, **saved})  # older records have no other folder

    @property
    def finished(self) -> bool:
        """Whether an earlier command has finished the folder, with all that this one writes."""
        saved = self.saved or {}
        return saved.get("finished") is True and (not self.flip or saved.get("flip") is True)

    def create(self) -> None:
        """Write the record, and remove unfinished files."""
        self._write(finished=False)
        self.remove_leftovers()

    def _write(self, finished: bool) -> None:
        flip = {"flip": True} if self.flip else {}
        self.write_record({**self.settings, **flip, "class_names": self.class_names, "finished": finished})

    def present(self, kind: Kind) -> set[int]:
        """The numbers of complete files. A truncated one, after a power failure, has another size."""
        if self.is_packed(kind):
            return set(range(self.count))
        sizes: dict[str, int] = {}
        for folder in (self.path / kind.folder).glob("[0-9]*"):
            with os.scandir(folder) as entries:
                sizes |= {f"{folder.name}/{entry.name}": entry.stat().st_size for entry in entries}
        return {number for number in range(self.count) if sizes.get(kind.file_name(number)) == kind.file_size}

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """The numbers with a missing file."""
        complete = self._complete()
        return [number for number in numbers if number not in complete]

    def _complete(self) -> set[int]:
        return set.intersection(*map(self.present, self.kinds.values()))

    def has(self, kind: Kind, number: int) -> bool:
        """Whether a file is complete."""
        path = self.path / kind.folder / kind.file_name(number)
        return self.is_packed(kind) or (path.is_file() and path.stat().st_size == kind.file_size)

    def is_packed(self, kind: Kind) -> bool:
        """Whether an earlier command has finished a folder and replaced it by a zip."""
        return (self.path / f"{kind.folder}.zip").is_file()

    def write(self, kind: Kind, number: int, data: bytes) -> None:
        """Write one file atomically, without the slow flush to disk: after a power failure its size may be wrong."""
        path = self.path / kind.folder / kind.file_name(number)
        write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)

    def finish(self, labels: np.ndarray | None) -> None:
        """Write dataset.json in both folders, for the images with complete files."""
        numbers = sorted(self._complete())
        if not numbers:
            raise UserError(f"--source must hold images that can be read, got {self.count} that cannot")
        with self.writing():
            for kind in self.kinds.values():
                if self.is_packed(kind):
                    continue
                names = map(kind.file_name, numbers)
                listed = None if labels is None else list(zip(names, labels[numbers].tolist(), strict=True))
                write_json(self.path / kind.folder / LABEL_FILE, {"labels": listed}, indent=None)
        self._write(finished=True)

    def latent_units(self) -> int:
        """The number of units whose latents are measured; 0 for images only, and for folders that are packed."""
        held = LATENTS in self.kinds and (self.path / self.kinds[LATENTS].folder).is_dir()
        return -(-self.count // UNIT) if held else 0

    def unit_moments(self, unit: int) -> Iterator[np.ndarray]:
        """The moments of a unit's images in order. Raises BadFile."""
        for number in range(unit * UNIT, min((unit + 1) * UNIT, self.count)):
            name = self.path / self.kinds[LATENTS].folder / latent_name(number)
            if name.is_file():  # others could not be read, and are left out
                yield decode_moments(name.read_bytes(), str(name))

    def check_space(self, pack: bool) -> None:
        """Raise UserError if the disk is too small for the missing files and, to pack, for the larger folder twice."""
        block = 4096  # bytes; files take whole blocks
        sizes = [-(-kind.file_size // block) * block for kind in self.kinds.values()]
        missing = [self.count - len(self.present(kind)) for kind in self.kinds.values()]
        needed = sum(map(operator.mul, missing, sizes)) + (self.count * max(sizes) if pack else 0)
        try:
            require_space(self.path, needed, "the data")
        except OSError as error:
            raise UserError(f"--dest must have more space: {error}") from error

    def pack(self) -> None:
        """Replace each folder by an uncompressed zip."""
        self.remove_leftovers()
        for kind in self.kinds.values():
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
    """pixels: (3, R, R) uint8; problem: why they could not be read or written."""

    number: int
    pixels: Tensor | None
    problem: BadFile | UserError | None


class Cropper:
    """Crops in worker processes. Returns errors, since DataLoader would wrap exceptions in a long traceback.

    Args:
        crop: makes (3, R, R) uint8 of an image.
        write: writes the pixels of an image there as well.
    """

    def __init__(
        self,
        source: ImageSource,
        crop: Callable[[Image.Image], np.ndarray],
        write: Callable[[int, np.ndarray], None] | None = None,
    ) -> None:
        self.source = source
        self.crop = crop
        self.write = write

    def __getitem__(self, number: int) -> Cropped:
        try:
            pixels = self.crop(decode_image(self.source.read(number), self.source.name(number)))
            if self.write is not None:
                self.write(number, pixels)
        except (BadFile, UserError) as problem:
            return Cropped(number, None, problem)
        return Cropped(number, torch.from_numpy(pixels), None)


def cropped_batches(cropper: Cropper, batches: list[list[int]], num_workers: int) -> Iterator[list[Cropped]]:
    """Crop images by number, a batch at a time, in worker processes."""
    loader: DataLoader = DataLoader(
        cropper,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=useful_workers(num_workers, len(batches)),
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_parent,
    )
    return prefetch(loader)


def usable(batch: list[Cropped], on_bad_file: OnBadFile, faults: list[BadFile]) -> list[Cropped]:
    """Those that could be read; the others are added to `faults`. Raises UserError if none may be left out."""
    for problem in (cropped.problem for cropped in batch if cropped.problem is not None):
        if isinstance(problem, UserError):
            raise problem
        leave_out(problem, on_bad_file, faults)
    return [cropped for cropped in batch if cropped.problem is None]


def leave_out(fault: BadFile, on_bad_file: OnBadFile, faults: list[BadFile]) -> None:
    """Log a file that cannot be used and add it to `faults`. Raises UserError with "refuse"."""
    if on_bad_file == "refuse":
        raise fault.as_user_error() from fault
    faults.append(fault)
    logger.warning("skipped: %s (%d so far)", fault, len(faults))


def in_batches(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _write_image(destination: Destination, number: int, pixels: np.ndarray) -> None:
    kind = destination.kinds[IMAGES]
    with destination.writing():
        if not destination.has(kind, number):
            destination.write(kind, number, encode_png(pixels))


@dataclass
class Preparation:
    """The work of one process; `vae` is None for images only, `faults` are the skipped files."""

    source: ImageSource
    destination: Destination
    resolution: int
    vae: VAE | None
    batch_size: int
    num_workers: int
    on_bad_file: OnBadFile
    faults: list[BadFile] = field(default_factory=list)

    def run(self, numbers: list[int]) -> Iterator[int]:
        """Write the files of these numbers, and yield the size of each finished batch. Raises UserError."""
        crop = functools.partial(center_crop, size=self.resolution)
        cropper = Cropper(self.source, crop, functools.partial(_write_image, self.destination))
        for batch in cropped_batches(cropper, in_batches(numbers, self.batch_size), self.num_workers):
            self._encode(usable(batch, self.on_bad_file, self.faults))
            yield len(batch)

    def _encode(self, images: list[Cropped]) -> None:
        for name, kind in self.destination.kinds.items():
            missing = [image for image in images if name != IMAGES and not self.destination.has(kind, image.number)]
            if self.vae is None or not missing:
                continue
            pixels = to_unit(torch.stack([image.pixels for image in missing]).to(self.vae.device))
            moments = self.vae.encode(pixels.flip(-1) if name == FLIP else pixels).cpu().numpy()
            with self.destination.writing():
                for image, array in zip(missing, moments, strict=True):
                    self.destination.write(kind, image.number, encode_npy(array))
