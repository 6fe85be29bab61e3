"""Measure how far drawn images are from real ones, and how far a cached run is from its uncached baseline.

Give exactly one of --run (every checkpoint of a run), --ckpt (one checkpoint) or --samples (images drawn before).
The images of --run and --ckpt are sampled first. Of a run on the digits, every checkpoint is evaluated by FD and label
accuracy; all else gets every metric that its features and its reference allow.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from haste.cli.flags import sample
from haste.errors import UserError
from haste.generation.config import SamplingConfig

FULL = "full"  # --baseline: draw it


@dataclass(kw_only=True)
class Args(SamplingConfig):
    """The flags of `haste evaluate`."""

    run: Path | None = None
    """A run's folder: every checkpoint is evaluated. On digits, writes evaluation.jsonl and evaluation.png there."""
    ckpt: Path | None = None
    """A checkpoint file, or a run's folder: then its newest whole checkpoint."""
    samples: Path | None = None
    """A folder of PNGs or an .npz, as `haste sample` leaves them."""
    features: str | None = None
    """Whose features: inception:PATH with the weights of FID's Inception, a teacher's name or folder (dinov2-vit-l is
    FD-DINOv2), digits, or stored: then --samples and --reference hold features. [default: digits, for digits]"""
    reference: str | None = None
    """The real side: a folder of images, an .npz with arr_0 or with mu and sigma, or digits. [default: digits, for
    --features digits]"""
    save_reference: Path | None = None
    """Write the reference's features, their mean and covariance to this .npz, to give as --reference the next time."""
    baseline: str | None = None
    """The same images drawn without a cache, a folder or an .npz: how far the samples are from them. full: with
    --ckpt and --cache, draw them too, and compare the states after every step."""
    fast: bool = False
    """With --ckpt or --run: the recommended cache, in place of --cache and what goes with it."""
    num_fid_samples: int = 1000
    """How many images to draw for each checkpoint."""
    labels: str = "balanced"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn, such as 3,1,4."""
    per_proc_batch_size: int = 128
    """Images per batch, when they are drawn and in the network of --features."""
    kid_subset_size: int = 1000
    """Images in each of the 100 subsets that the KID is averaged over."""
    classifier_dir: Path | None = None
    """Where the classifier of the digits is kept; by default classifier/ beside the runs, or beside
    --samples."""

    def resolved(self) -> Args:
        """The same, with --fast and a file of labels replaced by what they stand for."""
        self.check_drawing()
        chosen = sample_args(self).resolved()
        names = [field.name for field in fields(SamplingConfig)]
        return replace(self, fast=False, **{name: getattr(chosen, name) for name in names})

    def check_drawing(self) -> None:
        if self.samples is None:
            return
        for name in [*(field.name for field in fields(SamplingConfig)), "fast"]:
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default:
                flag = name.replace("_", "-")
                given = f"--{flag} is given" if value is True else f"--{flag} is {value}"
                raise UserError(f"{given} beside --samples, which are drawn already; it needs --ckpt or --run")

    def check(self) -> None:
        super().check()
        given = [name for name in ("run", "ckpt", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(f'--{name}' for name in given)} are given" if given else "nothing is given"
            raise UserError(f"{what}; it must be exactly one of --run, --ckpt and --samples")
        if self.samples is not None and not self.samples.exists():
            raise UserError(f"--samples is {self.samples}, which does not exist")
        if self.features == "stored" and self.samples is None:
            raise UserError("--features is stored, so features must be given as --samples, not images to be drawn")
        self.check_baseline()

    def check_baseline(self) -> None:
        if self.baseline is None:
            return
        if self.run is not None or self.features == "stored":
            raise UserError(f"--baseline is {self.baseline}; images of --samples or --ckpt have a baseline, "
                            f"not {'--run' if self.run is not None else '--features stored'}")  # fmt: skip
        if self.baseline != FULL and not Path(self.baseline).exists():
            raise UserError(
                f"--baseline is {self.baseline}, which does not exist; it must be a folder, an .npz, or full"
            )
        if self.baseline == FULL and (self.ckpt is None or self.cache == "none"):
            raise UserError("--baseline is full, which samples without a cache what --ckpt samples with one; it needs "
                            "--ckpt and --cache or --fast, or give the folder of a baseline that is there")  # fmt: skip


def sample_args(args: Args) -> sample.Args:
    """The flags that both commands have, for `haste sample`."""
    shared = {field.name: getattr(args, field.name) for field in fields(sample.Args) if hasattr(args, field.name)}
    return sample.Args(**shared)
