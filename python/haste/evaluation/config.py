"""The settings of `haste evaluate`, which are its flags."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from haste.errors import UserError
from haste.generation.config import SampleConfig, SamplingConfig

FULL = "full"  # --baseline: sample it
STORED = "stored"  # --features


@dataclass(kw_only=True)
class EvaluateConfig(SamplingConfig):
    """What is evaluated, in which features, against what."""

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
    """The real images: a folder of images, an .npz with arr_0 or with mu and sigma, or digits. [default: digits, for
    --features digits]"""
    save_reference: Path | None = None
    """Write the reference's features, their mean and covariance to this .npz, to give as --reference the next time."""
    baseline: str | None = None
    """The same images sampled without a cache, a folder or an .npz: the samples' fidelity to them. full: with --ckpt
    and --cache, sample them too, and compare the states after every step."""
    fast: bool = False
    """With --ckpt or --run: the recommended cache, in place of --cache and what goes with it."""
    num_fid_samples: int = 1000
    """How many images to sample for each checkpoint."""
    labels: str = "balanced"
    """What to sample: random, balanced (0, 1, 2, ... in turn), or classes to take in turn, such as 3,1,4."""
    per_proc_batch_size: int = 128
    """Images per batch, when they are sampled and in the network of --features."""
    kid_subset_size: int = 1000
    """Images in each of the 100 subsets that KID is averaged over."""
    classifier_dir: Path | None = None
    """Where the classifier of the digits is kept; by default classifier/ beside the runs, or beside --samples."""

    def resolved(self) -> EvaluateConfig:
        """The same, with --fast and a file of labels replaced by what they stand for."""
        if self.samples is not None:
            self._check_nothing_is_sampled()
        chosen = self.sample_config().resolved()
        names = [field.name for field in fields(SamplingConfig)]
        return replace(self, fast=False, **{name: getattr(chosen, name) for name in names})

    def sample_config(self, **changes) -> SampleConfig:
        """The settings that `haste sample` has as well."""
        shared = {field.name: getattr(self, field.name) for field in fields(SampleConfig) if hasattr(self, field.name)}
        return SampleConfig(**{**shared, **changes})

    def sampling_config(self) -> SamplingConfig:
        """How images are sampled."""
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})

    @property
    def folder_of_classifier(self) -> Path:
        """As given, or beside the run, or beside the samples."""
        if self.classifier_dir is not None:
            return self.classifier_dir
        place = (self.samples or self.run or self.ckpt).resolve()
        if self.ckpt is not None and place.parent.name == "checkpoints":
            place = place.parents[1]
        return place.parent / "classifier"

    def check(self) -> None:
        """UserError for values out of bounds, and for settings that contradict each other."""
        super().check()
        given = [name for name in ("run", "ckpt", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(f'--{name}' for name in given)} are given" if given else "nothing is given"
            raise UserError(f"{what}; it must be exactly one of --run, --ckpt and --samples")
        if self.samples is not None and not self.samples.exists():
            raise UserError(f"--samples is {self.samples}, which does not exist")
        if self.features == STORED and self.samples is None:
            raise UserError("--features is stored, so features must be given as --samples, not images to be sampled")
        if self.baseline is not None:
            self._check_baseline()

    def _check_nothing_is_sampled(self) -> None:
        for name in [*(field.name for field in fields(SamplingConfig)), "fast"]:
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default:
                flag = name.replace("_", "-")
                given = f"--{flag} is given" if value is True else f"--{flag} is {value}"
                raise UserError(f"{given} beside --samples, which are there already; it needs --ckpt or --run")

    def _check_baseline(self) -> None:
        if self.run is not None or self.features == STORED:
            raise UserError(
                f"--baseline is {self.baseline}; images of --samples or --ckpt have a baseline, "
                f"not {'--run' if self.run is not None else '--features stored'}"
            )
        if self.baseline != FULL and not Path(self.baseline).exists():
            raise UserError(f"--baseline must be a folder, an .npz, or full, got {self.baseline}, which does not exist")
        if self.baseline == FULL and (self.ckpt is None or self.cache == "none"):
            raise UserError(
                "--baseline is full, which samples without a cache what --ckpt samples with one; it needs --ckpt and "
                "--cache or --fast, or give the folder of a baseline that is there"
            )
