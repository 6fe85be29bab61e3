"""From any pictures to REPA's layout: cropped PNGs, the moments of their latents, and their labels.

Picture number i of the source becomes file number i, so that a command that was killed goes on with the numbers that
are missing, and a file that cannot be used leaves a gap. Worker processes read, crop and write PNGs; the process
itself encodes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from haste.data.bad_files import BadFile, OnBadFile, refusal
from haste.data.destination import Destination, encode_npy, encode_png, told_in_one_line
from haste.data.loader import leave_signals_to_the_parent, read_ahead, useful_workers
from haste.data.pictures import center_crop, decode_picture
from haste.data.sources import PictureSource
from haste.data.training_data import to_unit
from haste.errors import UserError
from haste.vae import VAE

logger = logging.getLogger(__name__)


class Cropped(NamedTuple):
    """number: of the picture; pixels: (3, R, R) uint8; problem: why there are none, or why they were not written."""

    number: int
    pixels: Tensor | None
    problem: BadFile | UserError | None


class _CropAndWrite:
    """What worker processes run. Problems are values: DataLoader would wrap an exception into a page of traceback."""

    def __init__(self, source: PictureSource, destination: Destination, resolution: int) -> None:
        self.source = source
        self.destination = destination
        self.resolution = resolution

    def __getitem__(self, number: int) -> Cropped:
        try:
            picture = decode_picture(self.source.read(number), self.source.name(number))
            pixels = center_crop(picture, self.resolution)
            with told_in_one_line(self.destination.path):
                self.destination.write(self.destination.kinds[0], number, encode_png(pixels))
        except (BadFile, UserError) as problem:
            return Cropped(number, None, problem)
        return Cropped(number, torch.from_numpy(pixels), None)


@dataclass
class Preparation:
    """One process's part of a command. vae: None for pictures alone; faults: the files that were passed over."""

    source: PictureSource
    destination: Destination
    resolution: int
    vae: VAE | None
    batch_size: int
    num_workers: int
    on_bad_file: OnBadFile

    def __post_init__(self) -> None:
        self.faults: list[BadFile] = []

    def run(self, numbers: list[int]) -> Iterator[int]:
        """Write the files of these numbers; yields after each batch how many it had.

        Raises UserError for the first bad file that may not be skipped, and when the disk cannot be written.
        """
        for batch in self._cropped(numbers):
            for cropped in batch:
                if cropped.problem is not None:
                    self._judge(cropped.problem)
            self._encode([cropped for cropped in batch if cropped.problem is None])
            yield len(batch)

    def _judge(self, problem: BadFile | UserError) -> None:
        if isinstance(problem, UserError):
            raise problem
        if self.on_bad_file == "refuse":
            raise UserError(refusal(problem)) from problem
        self.faults.append(problem)
        logger.warning("skipped: %s (%d so far)", problem, len(self.faults))

    def _cropped(self, numbers: list[int]) -> Iterator[list[Cropped]]:
        loader = DataLoader(
            _CropAndWrite(self.source, self.destination, self.resolution),
            sampler=numbers,
            batch_size=self.batch_size,
            num_workers=useful_workers(self.num_workers, math.ceil(len(numbers) / self.batch_size)),
            collate_fn=list,
            worker_init_fn=leave_signals_to_the_parent,
        )
        return read_ahead(loader)

    def _encode(self, pictures: list[Cropped]) -> None:
        if self.vae is None or not pictures:
            return
        pixels = torch.stack([picture.pixels for picture in pictures]).to(self.vae.device)
        moments = self.vae.encode(to_unit(pixels)).cpu().numpy()
        with told_in_one_line(self.destination.path):
            for picture, array in zip(pictures, moments, strict=True):
                self.destination.write(self.destination.kinds[1], picture.number, encode_npy(array))
