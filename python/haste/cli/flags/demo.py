"""See HASTE at work on real handwritten digits, on one page: train, sample, evaluate, and look.

A small vision transformer learns to read scikit-learn's digits. A diffusion transformer learns to make them, once
aligned with it and once, the baseline, without. The page shows samples, the same noise with most steps forecast, and
both runs beside each other. Every step is a `haste` command that is printed before it runs. Started again, the demo
goes on where it was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from haste.caching.config import FAST
from haste.errors import UserError
from haste.training.config import preset_config
from haste.validation import DEFAULT_STEPS, check_numbers

POINTS = 5  # checkpoints of the run, each of which is evaluated


@dataclass(kw_only=True)
class Args:
    """The flags of `haste demo`."""

    output_dir: Path = Path("demo")
    """Where both runs, the teacher, the classifier and the page go."""
    max_train_steps: int = preset_config("digits").max_train_steps
    """Training steps of either run."""
    seed: int = 0
    """Seed of the training and of the samples."""
    num_steps: int = DEFAULT_STEPS
    """Sampling steps of the images that are compared."""
    interval: int = FAST.resolved_interval
    """Where steps are forecast: one full step every so many."""
    order: int = FAST.resolved_order
    """Where steps are forecast: the order; 0 repeats the last full step."""
    num_images: int = 100
    """Images that are drawn twice, in full and with most steps forecast."""
    num_fid_samples: int = 700
    """Images per checkpoint that is evaluated."""

    def check(self) -> None:
        """UserError for numbers beyond their bounds, and for a run too short to be evaluated at every point."""
        check_numbers(self)
        if self.max_train_steps < POINTS:
            raise UserError(f"--max-train-steps must be at least {POINTS}, got {self.max_train_steps}")
