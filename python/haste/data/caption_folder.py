"""The output folder of `haste prepare --captions`, whichever its layout, and what a process works with.

A command has stages, and a stage has units that are written whole or not at all: the images of REPA's layout, or the
shards of the compact one. A killed command resumes with the missing units, and several processes share them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from haste.data.caption_sources import CaptionSource
from haste.data.caption_store import NULL
from haste.data.dataset import to_unit
from haste.data.prepare import Cropped, encode_npy, leave_out
from haste.data.record import RECORD
from haste.errors import BadFile, OnBadFile, UserError
from haste.io import require_space, write_atomically
from haste.resumable import ResumableDir
from haste.text import TextEncoder, TextFormat
from haste.vae import VAE, LatentFormat

CROP = "the largest centered square, resized by Lanczos"


@dataclass
class Encoders:
    """What a process works with; `vae` is None for images only, `faults` are the files that are left out."""

    vae: VAE | None
    text: TextEncoder
    batch_size: int
    num_workers: int
    on_bad_file: OnBadFile
    faults: list[BadFile] = field(default_factory=list)

    def moments(self, batch: list[Cropped]) -> np.ndarray | None:
        """(n, 2C, S, S): the mean and the logarithm of the variance of the latents of cropped images."""
        if self.vae is None:
            return None
        pixels = torch.stack([cropped.pixels for cropped in batch if cropped.pixels is not None])
        return self.vae.encode_to_logvar(to_unit(pixels.to(self.vae.device))).cpu().numpy()

    def features(self, captions: Sequence[str]) -> np.ndarray:
        """(n, tokens, width), float32."""
        return self.text.encode(captions).cpu().numpy()


class Stage(NamedTuple):
    """What a process does next: `total` things of `name`, of which `done` are there, and the others as they come."""

    name: str
    total: int
    done: int
    run: Iterator[int]


class CaptionFolder(ResumableDir):
    """The output folder of `haste prepare --captions` in either layout; `latents` is None for images only."""

    flag, content, record_name = "--dest", "training data with captions", RECORD
    layout: str
    crop = CROP

    def __init__(
        self, path: Path, source: CaptionSource, resolution: int, latents: LatentFormat | None, text: TextFormat
    ) -> None:
        self.source = source
        self.resolution = resolution
        self.latents, self.text = latents, text
        self.count = len(source.images)
        settings = {
            "layout": self.layout,
            "resolution": resolution,
            "crop": CROP,
            "latents": None if latents is None else asdict(latents),
            "text": asdict(text),
            "images": self.count,
            "source": source.digest(),
        }
        super().__init__(path, {**settings, **self.own_settings()})

    def own_settings(self) -> dict[str, object]:
        """Settings of the layout."""
        return {}

    @property
    def finished(self) -> bool:
        """Whether an earlier command has finished the folder."""
        return self.saved is not None and self.saved.get("finished") is True

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Of one image; () without latents."""
        if self.latents is None:
            return ()
        side = self.latents.input_size(self.resolution)
        return 2 * self.latents.channels, side, side

    @property
    def null_path(self) -> Path:
        """Where the features of the empty caption are."""
        return self.path / NULL

    def create(self, encoders: Encoders) -> None:
        """Write the record and the features of the empty caption, and remove unfinished files."""
        self.write_record({**self.settings, "captions_of": self.source.origin, "finished": False})
        self.remove_leftovers()
        null = encode_npy(encoders.features([""])[0])
        with self.writing():
            write_atomically(self.null_path, lambda temporary: temporary.write_bytes(null))

    def check_space(self) -> None:
        """Raise UserError if the disk is too small for what is missing."""
        try:
            require_space(self.path, self.space_needed(), "the data")
        except OSError as error:
            raise UserError(f"--dest must have more space: {error}") from error

    @abstractmethod
    def space_needed(self) -> int:
        """Bytes of what is missing, at most."""

    @abstractmethod
    def stages(self, encoders: Encoders, process: int, processes: int) -> Iterator[Stage]:
        """The stages of one of several processes, each to be run to its end before the next."""

    @abstractmethod
    def latent_units(self) -> int:
        """The number of units whose latents are measured; 0 for images only."""

    @abstractmethod
    def unit_moments(self, unit: int) -> Iterator[np.ndarray]:
        """The moments (2C, S, S) of a unit's images in order, means and then standard deviations. Raises BadFile."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the record, once all processes have finished. Raises UserError if no image could be read."""

    def _finish(self, images: int, **totals: int) -> None:
        if not images:
            raise UserError(f"--captions must have images that can be read, got {self.count} that cannot")
        self.write_record(
            {**self.settings, "captions_of": self.source.origin, "held": images, **totals, "finished": True}
        )

    def captions(self, encoders: Encoders, number: int) -> list[str]:
        """The captions of an image; none if they cannot be read."""
        try:
            return self.source.captions(number)
        except BadFile as fault:
            leave_out(fault, encoders.on_bad_file, encoders.faults)
            return []
