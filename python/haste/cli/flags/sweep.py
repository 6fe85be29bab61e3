"""Draw the trade-off of feature caching: quality against seconds, FLOPs and memory, beside plain runs of fewer steps.

Every combination of the lists is drawn from one checkpoint, judged and timed; the table and the plot say which of them
are worth it. What a setting cannot do is passed over with a line. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Fixed, Suppress

from haste.errors import UserError
from haste.generation.config import SamplingConfig, list_labels
from haste.sweep.points import Grid, plan
from haste.validation import check_numbers


@dataclass(kw_only=True)
class Args(SamplingConfig):
    """The flags of `haste sweep`."""

    ckpt: Path
    """A checkpoint file, or the folder of a run: then its newest whole checkpoint."""

    # What every point has one of, a sweep has lists of.
    cache: Suppress[Fixed[str]] = "none"
    granularity: Suppress[Fixed[str]] = "module"
    interval: Suppress[Fixed[None]] = None
    order: Suppress[Fixed[None]] = None
    first_enhance: Suppress[Fixed[None]] = None
    full_steps: Suppress[Fixed[str]] = ""
    error_threshold: Suppress[Fixed[float]] = 0.0
    gate: Suppress[Fixed[None]] = None
    cached_blocks: Suppress[Fixed[None]] = None
    caches: tuple[Literal["reuse", "taylor", "newton", "hermite", "delta-dit"], ...] = ("taylor", "newton")
    """What stands in for a skipped step, as --cache of haste sample."""
    granularities: tuple[Literal["module", "block", "model"], ...] = ("module", "model")
    """What is forecast, as --granularity."""
    intervals: tuple[int, ...] = (3, 4, 5, 6)
    """One full step in so many, as --interval."""
    orders: tuple[int, ...] = (2, 4)
    """Orders of the forecast, as --order."""
    error_thresholds: tuple[float, ...] = (0.0,)
    """Bounds on the error of a forecast, as --error-threshold; 0: evenly spaced full steps."""
    gates: tuple[int, ...] = ()
    """delta-dit: where the skipped blocks change, as --gate. [default: 0.6 of the steps]"""
    steps: tuple[int, ...] = (50,)
    """Steps of the cached runs, each of which is run in full as well."""
    num_steps: tuple[int, ...] = (10, 12, 14, 17, 20, 25)  # type: ignore[assignment]
    """Steps of the plain runs that caching has to beat."""

    num_fid_samples: int = 1000
    """How many images to draw of each point."""
    per_proc_batch_size: int = 128
    """Images per batch, in which they are also timed."""
    labels: str = "balanced"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn: such as 3,1,4, or a text file
    with one on each line."""
    repeats: int = 3
    """How often each point is timed; all take turns."""
    cuda_graphs: bool = False
    """On a GPU: cached runs replay CUDA graphs, as with haste sample. Plain runs never do. Not yet tried on a GPU."""
    features: str | None = None
    """Whose features, as for haste evaluate: inception:PATH, a teacher's name or folder, or digits. [default: digits,
    for a run on digits]"""
    reference: str | None = None
    """The real side: a folder of images, an .npz with arr_0 or with mu and sigma, or digits. [default: digits, for
    --features digits]"""
    classifier_dir: Path | None = None
    """Where the classifier of the digits is kept; by default classifier/ beside the runs."""
    tolerance: float = 0.05
    """A setting is good enough if its FD is so much above the full run's at most, as a share of it."""
    output: Path | None = None
    """Where sweep.jsonl, sweep.md and sweep.png go; by default sweep/ in the run's folder."""
    draw_only: bool = False
    """Measure nothing: the table and the plot of the sweep that was measured last."""

    def check(self) -> None:
        check_numbers(self)
        self.base.check()
        if not self.steps:
            raise UserError("--steps is empty; it must be one number of steps or more")

    def resolved(self) -> Args:
        """The same without what has no effect."""
        return self.effective()

    @property
    def base(self) -> SamplingConfig:
        """What all points share."""
        shared = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        chosen = {"num_steps": max(self.steps, default=1), "labels": list_labels(self.labels)}
        return SamplingConfig(**{**shared, **chosen})

    @property
    def points(self) -> list[SamplingConfig]:
        grid = Grid(
            caches=self.caches,
            granularities=self.granularities,
            intervals=self.intervals,
            orders=self.orders,
            error_thresholds=self.error_thresholds,
            gates=self.gates or (None,),
            steps=self.steps,
        )
        return plan(self.base, [grid], self.num_steps)
