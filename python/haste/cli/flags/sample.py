"""Draw images from a checkpoint: PNGs, an .npz for evaluators, and a grid to look at.

The flags are those of REPA's and HASTE's generate.py, and their checkpoints and SiT's are read as well as those of
`haste train`. `--fast` computes only some steps in full and forecasts the others; `--cache` chooses how. A command that
was stopped goes on with the images that are missing.

On several GPUs: `torchrun --nproc_per_node 8 -m haste sample ...`, or `accelerate launch -m haste sample ...`.
"""

from haste.generation.config import SampleConfig as Args

__all__ = ["Args"]
