"""The settings of `haste evaluate`, which are its flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from haste.errors import UserError
from haste.generation.config import SampleConfig, SamplingConfig
from haste.metrics.config import STORED

FULL = "full"  # --baseline: sample it


@dataclass(kw_only=True)
class EvaluateConfig(SamplingConfig):
    """What to evaluate, in which features, against which reference."""

    run: Path | None = None
    """Run folder; evaluates every checkpoint. On digits, writes evaluation.jsonl and evaluation.png there."""
    ckpt: Path | None = None
    """Checkpoint file, or run folder for its latest checkpoint."""
    samples: Path | None = None
    """Folder of PNGs or .npz, as written by `haste sample`."""
    features: str | None = None
    """Feature extractor: inception:PATH for FID's Inception with these weights, pytorch-fid:PATH for the same with
    images resized as U-ViT's MS-COCO statistics need it, the name or folder of a teacher (dinov2-vit-l for FD-DINOv2),
    digits, or stored if --samples and --reference hold features. Several are separated by commas. [default: digits, for
    digits]"""
    reference: str | None = None
    """Real images: an image folder, an .npz with arr_0 or with mu and sigma, or digits; for several --features one, or
    as many, separated by commas. [default: digits, for --features digits]"""
    relative_to: Path | None = None
    """Baseline that haste evaluate has scored in the same --features against the same --reference, such as a folder of
    as many held-out real images: reports FDr, the mean over --features of the FD divided by the baseline's."""
    save_reference: Path | None = None
    """Save the reference's features, mean and covariance to this .npz, for --reference."""
    clip: str | None = None
    """CLIP model, a folder or a hub name: reports the CLIP score of images with their captions, the mean of
    max(100 cos, 0). Of --samples they are captions.json in the folder, or captions in the .npz."""
    baseline: str | None = None
    """Uncached samples of the same seed, a folder or .npz; reports PSNR and SSIM. full: with --ckpt and --cache, sample
    them and also compare the states after each step."""
    fast: bool = False
    """Use the recommended cache settings with --ckpt or --run."""
    num_fid_samples: int = 1000
    """Number of images to sample per checkpoint."""
    labels: str = "balanced"
    """Class labels: random, balanced (0, 1, 2, ... in turn), none for images of no class, which have no label accuracy,
    or a list such as 3,1,4 to cycle through."""
    per_proc_batch_size: int = 128
    """Batch size for sampling and feature extraction."""
    kid_subset_size: int = 1000
    """Images per KID subset; KID is the mean over 100 subsets."""
    classifier_dir: Path | None = None
    """Folder of the digits classifier. [default: classifier/ next to the runs or --samples]"""

    def resolved(self) -> EvaluateConfig:
        """The same settings with --fast and a label file expanded."""
        if self.samples is not None:
            self._check_nothing_is_sampled()
            return self
        chosen = self.sample_config().resolved()
        names = [field.name for field in fields(SamplingConfig)]
        return replace(self, **{name: getattr(chosen, name) for name in names})

    def sample_config(self, **changes) -> SampleConfig:
        """The settings shared with `haste sample`, with changes."""
        shared = {field.name: getattr(self, field.name) for field in fields(SampleConfig) if hasattr(self, field.name)}
        return SampleConfig(**{**shared, "ckpt": self.ckpt or self.run or Path(), **changes})

    def sampling_config(self) -> SamplingConfig:
        """The settings that decide the sampled images."""
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})

    @property
    def trained(self) -> Path:
        """The run or the checkpoint to evaluate; only without --samples."""
        assert self.run is not None or self.ckpt is not None
        return self.run or self.ckpt  # type: ignore[return-value]

    @property
    def folder_of_classifier(self) -> Path:
        """--classifier-dir, or a folder next to the run or the samples."""
        if self.classifier_dir is not None:
            return self.classifier_dir
        place = (self.samples or self.trained).resolve()
        if self.ckpt is not None and place.parent.name == "checkpoints":
            place = place.parents[1]
        return place.parent / "classifier"

    def check(self) -> None:
        """Raise UserError for values out of bounds and settings that contradict each other."""
        super().check()
        given = [f"--{name}" for name in ("run", "ckpt", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"exactly one of --run, --ckpt and --samples must be given, got {' and '.join(given) or 'none'}"
            )
        if self.samples is not None and not self.samples.exists():
            raise UserError(f"--samples must be a folder or a file, got {self.samples}, which does not exist")
        if self.features == STORED and self.samples is None:
            raise UserError(f"--features stored must come with --samples that hold features, got {given[0]}")
        if self.features == STORED and self.clip is not None:
            raise UserError(f"--clip must come with images, got --features stored and --clip {self.clip}")
        self._check_several()
        check_classifier_dir(self.classifier_dir)
        if self.baseline is not None:
            self._check_baseline(self.baseline)

    def _check_several(self) -> None:
        """Of networks and references, and what they allow."""
        names, references = ((text or "").split(",") for text in (self.features, self.reference))
        if len(set(names)) < len(names) or (len(names) > 1 and {"", STORED} & set(names)):
            raise UserError(f"--features must be different networks, separated by commas, got {self.features}")
        if len(references) not in (1, len(names)):
            raise UserError(f"--reference must be one, or one for each of the {len(names)} networks of --features, got "
                            f"{self.reference}")  # fmt: skip
        for flag, given in (("run", self.run), ("save-reference", self.save_reference)):
            if given is not None and len(names) > 1:
                raise UserError(f"--features must be one network with --{flag}, got {self.features}")
        if self.relative_to is not None and self.run is not None:
            raise UserError("--relative-to must come with --samples or --ckpt, got --run")

    def _check_nothing_is_sampled(self) -> None:
        for field in [*fields(SamplingConfig), self.__dataclass_fields__["fast"]]:
            if getattr(self, field.name) != self.__dataclass_fields__[field.name].default:
                flag = field.name.replace("_", "-")
                raise UserError(f"--{flag} must come with --ckpt or --run, got --samples, which are not sampled here")

    def _check_baseline(self, baseline: str) -> None:
        if self.run is not None or self.features == STORED:
            other = "--run" if self.run is not None else "--features stored"
            raise UserError(f"--baseline must come with images of --samples or --ckpt, got {other}")
        if baseline != FULL and not Path(baseline).exists():
            raise UserError(f"--baseline must be a folder, an .npz, or full, got {baseline}, which does not exist")
        if baseline == FULL and (self.ckpt is None or self.cache == "none"):
            raise UserError(
                "--baseline full must come with --ckpt and a cache (--cache or --fast), or be a folder of samples, got "
                + ("--samples" if self.ckpt is None else "--cache none")
            )


def check_classifier_dir(folder: Path | None) -> None:
    """Raise UserError, before a classifier is trained, if --classifier-dir cannot be a folder that holds it."""
    if folder is None:
        return
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(
            f"--classifier-dir must be a folder, got {folder}"
            + ("" if nearest == folder else f", where {nearest} is a file")
        )
    if nearest != folder and not os.access(nearest, os.W_OK):
        raise UserError(f"--classifier-dir must be a folder that can be made, got {folder}: {nearest} is read-only")
