"""Make training data in REPA's layout from any pictures: cropped as ADM does, with their latents.

`--source` is a folder with a folder of pictures for each class, a zip of one, or a Hugging Face data set on disk. A
command that was stopped goes on with the pictures that are missing. `accelerate launch -m haste prepare ...` shares the
work among several GPUs.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from haste.data.bad_files import OnBadFile
from haste.data.destination import Destination
from haste.data.prepare import Preparation
from haste.data.sources import PictureSource, open_pictures
from haste.errors import UserError
from haste.training.signals import StopRequest
from haste.vae import VAE, LatentFormat


@dataclass(kw_only=True)
class Args:
    """The flags of `haste prepare`."""

    source: Path
    """The pictures. Classes are the folders at the top, in alphabetical order, or what a dataset.json says."""
    dest: Path
    """The folder that gets images/ and vae-sd/, for `haste train --data-dir`."""
    resolution: int = 256
    """Pixels per side of the cropped pictures."""
    vae: str = "mse"
    """What makes the latents: mse or ema (Stable Diffusion's), a hub name, a folder; or none for pictures alone."""
    zip: bool = False
    """Pack the finished folders into images.zip and vae-sd.zip."""
    on_bad_file: OnBadFile = "refuse"
    """What to do about a picture that cannot be read: stop, or name it and leave it out."""
    batch_size: int = 32
    """Pictures that are encoded together."""
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that read and crop."""

    def check(self) -> None:
        for name, least in (("resolution", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.dest.expanduser().resolve().is_relative_to(self.source.expanduser().resolve()):
            raise UserError(f"--dest is {self.dest}, inside --source; it must be a folder elsewhere")


def main(args: Args) -> None:
    """Prepare what is missing, and say what came out."""
    args.check()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # One of several processes may be done hours before another.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    source = open_pictures(args.source.expanduser(), "--source")
    latents = None if args.vae.lower() == "none" else LatentFormat.of(args.vae)
    destination = Destination(args.dest.expanduser(), source, args.resolution, latents)
    accelerator.wait_for_everyone()  # each has seen whose folder it is before the first one claims it
    if not destination.finished:
        fill(args, accelerator, source, destination, None if latents is None else VAE(latents))
    if accelerator.is_main_process:
        if args.zip:
            destination.pack()
        print(f"{destination.path} is ready for haste train --data-dir")


def fill(
    args: Args, accelerator: Accelerator, source: PictureSource, destination: Destination, vae: VAE | None
) -> None:
    """Write this process's share of the missing files and, once all are there, the labels."""
    if accelerator.is_main_process:
        destination.check_space(args.zip)
        destination.claim()
    accelerator.wait_for_everyone()
    vae = vae.to(accelerator.device) if vae is not None else None
    preparation = Preparation(
        source, destination, args.resolution, vae, args.batch_size, args.num_workers, args.on_bad_file
    )
    share = range(accelerator.process_index, len(source), accelerator.num_processes)
    missing = destination.missing(share)
    bar = tqdm(total=len(share), initial=len(share) - len(missing), unit="image", desc="prepare")
    with bar, logging_redirect_tqdm(), StopRequest() as stop:
        for count in preparation.run(missing):
            bar.update(count)
            if stop.received is not None:
                break
    if stop.received is not None:
        print(f"haste prepare: stopped by {stop.received.name}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    if preparation.faults:
        print(f"{len(preparation.faults)} of {len(share)} pictures cannot be read and are left out")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        destination.finish(source.labels)
