"""Make training data in REPA's layout from any images: cropped as ADM does, with their latents.

`--source` is a folder with a folder of images for each class, a zip of one, or a Hugging Face data set on disk. A
command that was stopped goes on with the images that are missing. `accelerate launch -m haste prepare ...` shares the
work among several GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from haste.data.images import OnBadFile
from haste.errors import UserError
from haste.validation import check_numbers


@dataclass(kw_only=True)
class Args:
    """The flags of `haste prepare`."""

    source: Path
    """The images. Classes are the folders at the top, in alphabetical order, or what a dataset.json says."""
    dest: Path
    """The folder that gets images/ and vae-sd/, for `haste train --data-dir`."""
    resolution: int = 256
    """Pixels per side of the cropped images."""
    vae: str = "mse"
    """What makes the latents: mse or ema (Stable Diffusion's), a hub name, a folder; or none for images alone."""
    zip: bool = False
    """Pack the finished folders into images.zip and vae-sd.zip."""
    on_bad_file: OnBadFile = "refuse"
    """What to do about an image that cannot be read: stop, or name it and leave it out."""
    batch_size: int = 32
    """Images that are encoded together."""
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that read and crop."""

    def check(self) -> None:
        """UserError for numbers beyond their bounds, and for a destination inside the source."""
        check_numbers(self)
        if self.dest.expanduser().resolve().is_relative_to(self.source.expanduser().resolve()):
            raise UserError(f"--dest is {self.dest}, inside --source; it must be a folder elsewhere")
