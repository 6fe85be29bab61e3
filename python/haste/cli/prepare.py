"""Make training data in REPA's layout from any images: cropped as ADM does, with their latents.

`--source` is a folder with a folder of images for each class, a zip of one, or a Hugging Face data set on disk. A
command that was stopped resumes with the images that are missing. `accelerate launch -m haste prepare ...` shares the
work among several GPUs.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from haste.errors import OnBadFile, UserError
from haste.validation import check_numbers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from haste.data.prepare import Destination
    from haste.data.sources import ImageSource
    from haste.vae import VAE


@dataclass(kw_only=True)
class PrepareConfig:
    """The settings of `haste prepare`, which are its flags."""

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


def main(config: PrepareConfig) -> None:
    """Prepare what is missing, and say what came out."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    from haste.data.prepare import Destination
    from haste.data.sources import open_source
    from haste.distributed import in_first
    from haste.vae import VAE, LatentFormat

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # One of several processes may be done hours before another.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    source = open_source(config.source.expanduser(), "--source")
    latents = None if config.vae.lower() == "none" else LatentFormat.of(config.vae)
    destination = Destination(config.dest.expanduser(), source, config.resolution, latents)
    with ExitStack() as stack:
        in_first(accelerator, lambda: stack.enter_context(destination.hold()))
        if not destination.finished:
            fill(config, accelerator, source, destination, None if latents is None else VAE(latents))
        if accelerator.is_main_process:
            if config.zip:
                destination.pack()
            print(f"{destination.path} is ready for haste train --data-dir")


def fill(
    config: PrepareConfig, accelerator: Accelerator, source: ImageSource, destination: Destination, vae: VAE | None
) -> None:
    """Write this process's part of the missing files and, once all are there, the labels."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from haste.data.prepare import Preparation
    from haste.distributed import StopRequest, progress_bar

    if accelerator.is_main_process:
        destination.check_space(config.zip)
        destination.create()
    accelerator.wait_for_everyone()
    vae = vae.to(accelerator.device) if vae is not None else None
    preparation = Preparation(
        source, destination, config.resolution, vae, config.batch_size, config.num_workers, config.on_bad_file
    )
    part = range(accelerator.process_index, len(source), accelerator.num_processes)
    missing = destination.missing(part)
    bar = progress_bar(total=len(part), initial=len(part) - len(missing), unit="image", desc="prepare")
    with bar, logging_redirect_tqdm(), StopRequest() as stop:
        for count in preparation.run(missing):
            bar.update(count)
            if stop.received is not None:
                break
    if stop.received is not None:
        print(f"haste prepare: stopped by {stop.received.name}; the same command resumes from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    if preparation.faults:
        print(f"{len(preparation.faults)} of {len(part)} images cannot be read and are left out")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        destination.finish(source.labels)
