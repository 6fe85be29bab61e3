"""Carries out `haste sample`."""

from __future__ import annotations

import logging

from haste.distributed import Processes
from haste.generation.config import SampleConfig
from haste.generation.sample_dir import Samples, sample_to_folder


def main(args: SampleConfig) -> None:
    """Draw, and say what came out."""
    processes = Processes()
    # Of several processes one tells what happens, all tell what is wrong.
    logging.basicConfig(level=logging.INFO if processes.first else logging.WARNING, format="%(message)s")
    samples = sample_to_folder(args)
    if processes.first:
        report(samples)
    processes.leave()


def report(samples: Samples) -> None:
    """Print how fast images came, unless all were there, and where they are."""
    folder, drawn, count = samples.folder, samples.drawn, len(samples.labels)
    if samples.new:
        speed = f"{drawn.images_per_second:.1f} images/s ({drawn.seconds:.2f} s for {drawn.images})"
        came = f"{count} images at {speed}"
    else:
        came = f"{count} images were there already"
    print(f"{came}; {drawn.full_per_image} of {drawn.evaluations_per_image} model evaluations were full")
    print(f"images  {folder.path}\nnpz       {folder.npz}\ngrid      {folder.grid}")
