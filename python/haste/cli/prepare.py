"""Carries out `haste prepare`: every process crops and encodes its share of the images."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.contrib.logging import logging_redirect_tqdm

from haste.cli.flags.prepare import Args
from haste.data.prepare import Destination, Preparation
from haste.data.sources import ImageSource, open_images
from haste.distributed import StopRequest, progress_bar
from haste.training.launch import in_first
from haste.vae import VAE, LatentFormat


def main(args: Args) -> None:
    """Prepare what is missing, and say what came out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # One of several processes may be done hours before another.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    source = open_images(args.source.expanduser(), "--source")
    latents = None if args.vae.lower() == "none" else LatentFormat.of(args.vae)
    destination = Destination(args.dest.expanduser(), source, args.resolution, latents)
    with ExitStack() as stack:
        in_first(accelerator, lambda: stack.enter_context(destination.hold()))
        if not destination.finished:
            fill(args, accelerator, source, destination, None if latents is None else VAE(latents))
        if accelerator.is_main_process:
            if args.zip:
                destination.pack()
            print(f"{destination.path} is ready for haste train --data-dir")


def fill(args: Args, accelerator: Accelerator, source: ImageSource, destination: Destination, vae: VAE | None) -> None:
    """Write this process's share of the missing files and, once all are there, the labels."""
    if accelerator.is_main_process:
        destination.check_space(args.zip)
        destination.create()
    accelerator.wait_for_everyone()
    vae = vae.to(accelerator.device) if vae is not None else None
    preparation = Preparation(
        source, destination, args.resolution, vae, args.batch_size, args.num_workers, args.on_bad_file
    )
    share = range(accelerator.process_index, len(source), accelerator.num_processes)
    missing = destination.missing(share)
    bar = progress_bar(total=len(share), initial=len(share) - len(missing), unit="image", desc="prepare")
    with bar, logging_redirect_tqdm(), StopRequest() as stop:
        for count in preparation.run(missing):
            bar.update(count)
            if stop.received is not None:
                break
    if stop.received is not None:
        print(f"haste prepare: stopped by {stop.received.name}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    if preparation.faults:
        print(f"{len(preparation.faults)} of {len(share)} images cannot be read and are left out")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        destination.finish(source.labels)
