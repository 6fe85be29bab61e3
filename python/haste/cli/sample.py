"""Sample images from a checkpoint: PNGs, an .npz for evaluators, and a grid to look at.

The flags are those of REPA's and HASTE's generate.py, and their checkpoints and SiT's are read as well as those of
`haste train`. `--fast` computes only some steps in full and forecasts the others; `--cache` chooses how. A command that
was stopped resumes with the images that are missing.

On several GPUs: `torchrun --nproc_per_node 8 -m haste sample ...`, or `accelerate launch -m haste sample ...`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from haste.generation.config import SampleConfig

if TYPE_CHECKING:
    from haste.generation.sample_dir import Samples


def main(config: SampleConfig) -> None:
    """Sample, and print what came out."""
    from haste.distributed import Processes
    from haste.generation.sample_dir import sample_to_folder

    processes = Processes()
    # Of several processes one tells what happens, all tell what is wrong.
    logging.basicConfig(level=logging.INFO if processes.first else logging.WARNING, format="%(message)s")
    samples = sample_to_folder(config)
    if processes.first:
        report(samples)
    processes.leave()


def report(samples: Samples) -> None:
    """Print how fast images came, unless all were there, and where they are."""
    folder, sampled, count = samples.folder, samples.sampled, len(samples.labels)
    if samples.new:
        speed = f"{sampled.images_per_second:.1f} images/s ({sampled.seconds:.2f} s for {sampled.images})"
        came = f"{count} images at {speed}"
    else:
        came = f"{count} images were there already"
    print(f"{came}; {sampled.full_per_image} of {sampled.calls_per_image} model calls were full")
    print(f"images  {folder.path}\nnpz       {folder.npz}\ngrid      {folder.grid}")
