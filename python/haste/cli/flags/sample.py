"""Draw images from a checkpoint: PNGs, an .npz for evaluators, and a grid to look at.

The flags are those of REPA's and HASTE's generate.py, and their checkpoints and SiT's are read as well as those of
`haste train`. `--fast` computes only some steps in full and forecasts the others; `--cache` chooses how. A command that
was stopped goes on with the images that are missing.

On several GPUs: `torchrun --nproc_per_node 8 -m haste sample ...`, or `accelerate launch -m haste sample ...`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from haste.caching.config import CacheConfig, fast_config
from haste.errors import UserError
from haste.generation.config import PublishedFlags, SamplingConfig
from haste.generation.pipeline import list_labels


@dataclass(kw_only=True)
class Args(SamplingConfig, PublishedFlags):
    """The flags of `haste sample`."""

    ckpt: Path
    """A checkpoint file, or the folder of a run: then its newest whole checkpoint."""
    fast: bool = False
    """The recommended cache, in place of --cache and what goes with it. Made for the ODE."""
    num_fid_samples: int = 100
    """How many images to draw. (50,000 for a published FID.)"""
    per_proc_batch_size: int = 128
    """Images per batch of each process. Changes the speed and the memory, not the images."""
    sample_dir: Path | None = None
    """Where the folder of images goes; by default samples/ in the run's folder."""
    fused_attn: bool = True
    """Fused attention; --no-fused-attn computes it step by step."""
    tf32: bool = True
    """Let NVIDIA GPUs round fp32 matrix products to TF32."""
    compile: bool = False
    """Let torch.compile fuse the model. The first batch takes a minute or so longer."""
    cuda_graphs: bool = False
    """On a GPU and with a cache: replay full and forecast evaluations as CUDA graphs. Not yet tried on a GPU."""

    def resolved(self) -> Args:
        """The same, with --fast and a file of labels replaced by what they stand for, without what has no effect."""
        chosen: dict[str, Any] = {}
        if self.fast:
            for name, default in asdict(CacheConfig()).items():
                value = getattr(self, name)
                if value != default:
                    flag = name.replace("_", "-")
                    raise UserError(f"--{flag} is {value} beside --fast, which chooses it; give one or the other")
            chosen = asdict(fast_config(self.num_steps, noisy=self.mode == "sde"))
        return replace(self, fast=False, labels=list_labels(self.labels), **chosen).effective()
