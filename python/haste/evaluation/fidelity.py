"""How far a cached run is from its uncached baseline: the same numbers drawn with every step in full.

Images: PSNR, 10·log₁₀(255² / mean squared error), and SSIM (Wang et al., 2004), both as scikit-image computes them.
States: the relative error ‖x_cached − x_full‖ / ‖x_full‖ of each image's state after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from haste.errors import UserError
from haste.evaluation.image_readers import ImageArray, ImageFiles, ImageSet, NpzImages, open_images
from haste.generation.pipeline import Sampler
from haste.generation.sample_dir import RECORD, read_record

WORST = 0.05  # the share of the images that "worst" means
GAUSSIAN_WINDOW = 11  # pixels per side of the published window of SSIM
SMALL_WINDOW = 7  # of equal weights, for images that the published one does not fit into
BATCH = 64


@dataclass(frozen=True)
class Fidelity:
    """Of every image to its baseline: psnr (N,) in dB, infinite where they are identical, and ssim (N,), at most 1."""

    psnr: np.ndarray
    ssim: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means, and means over the worst 5 % (at least one). PSNR is over images that differ, None if none do."""
        differ = self.psnr[np.isfinite(self.psnr)]
        return {
            "images": len(self.psnr),
            "identical": int(len(self.psnr) - len(differ)),
            "psnr": float(differ.mean()) if len(differ) else None,
            "psnr_worst": mean_of_worst(differ) if len(differ) else None,
            "ssim": float(self.ssim.mean()),
            "ssim_worst": mean_of_worst(self.ssim),
        }


def mean_of_worst(values: np.ndarray) -> float:
    """The mean over the lowest 5 %, one value at least."""
    return float(np.sort(values)[: max(round(WORST * len(values)), 1)].mean())


def compare_images(
    images: np.ndarray | ImageSet,
    baselines: np.ndarray | ImageSet,
    progress: Callable[[int], None] = lambda count: None,
) -> Fidelity:
    """Each image with its baseline, both sets (N, H, W, 3) uint8. `progress` hears of the images done.

    Raises UserError for sets of other number or size, and for images that are too small for SSIM.
    """
    images, baselines = (ImageArray(side) if isinstance(side, np.ndarray) else side for side in (images, baselines))
    if (len(images), images.shape) != (len(baselines), baselines.shape):
        (height, width, _), (baseline_height, baseline_width, _) = images.shape, baselines.shape
        raise UserError(
            f"{len(images)} images of {width} x {height} cannot be compared with {len(baselines)} of "
            f"{baseline_width} x {baseline_height}; a baseline has the same images"
        )
    if min(images.shape[:2]) < SMALL_WINDOW:
        raise UserError(f"images of {images.shape[1]} x {images.shape[0]} are too small for SSIM, "
                        f"which looks at {SMALL_WINDOW} x {SMALL_WINDOW} pixels")  # fmt: skip
    psnr, ssim = [], []
    for batch, baseline_batch in zip(images.batches(BATCH), baselines.batches(BATCH), strict=True):
        psnr += [signal_to_noise(*pair) for pair in zip(batch, baseline_batch, strict=True)]
        ssim += [similarity(*pair) for pair in zip(batch, baseline_batch, strict=True)]
        progress(len(batch))
    return Fidelity(np.array(psnr), np.array(ssim))


def signal_to_noise(image: np.ndarray, baseline: np.ndarray) -> float:
    """PSNR of one image (H, W, 3) uint8, in dB."""
    with np.errstate(divide="ignore"):  # identical images
        return float(peak_signal_noise_ratio(baseline, image, data_range=255))


def similarity(image: np.ndarray, baseline: np.ndarray) -> float:
    """SSIM of one image (H, W, 3) uint8: Gaussian windows of 11 × 11 as published, 7 × 7 in smaller images."""
    if min(image.shape[:2]) >= GAUSSIAN_WINDOW:
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    else:
        window = {"win_size": SMALL_WINDOW}
    return float(structural_similarity(baseline, image, data_range=255, channel_axis=-1, **window))


def compare_sets(
    samples: Path,
    baseline: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    count: int | None = None,
) -> Fidelity:
    """The images of two folders or .npz files, number by number: all, or the first `count`.

    `progress` hears of the images done and of their number. Raises UserError for sets that are no baselines.
    """
    images, baselines = (
        open_images(path, flag, count) for path, flag in ((samples, "--samples"), (baseline, "--baseline"))
    )
    check_same_images(samples, images, baseline, baselines)
    return compare_images(images, baselines, lambda done: progress(done, len(images)))


def check_same_images(samples: Path, images: ImageSet, baseline: Path, baselines: ImageSet) -> None:
    """UserError unless two sets of images on disk show the same numbers of the same command but for its speed."""
    if isinstance(images, ImageFiles) and isinstance(baselines, ImageFiles):
        numbers, baseline_numbers = images.numbers() or images.names, baselines.numbers() or baselines.names
        differing = sorted(set(map(str, numbers)) ^ set(map(str, baseline_numbers)))
        if differing:
            raise UserError(
                f"{samples} and {baseline} hold different images: {len(differing)} are in one alone, such as "
                f"{differing[0]}; a baseline has the same ones"
            )
        if (samples / RECORD).is_file() and (baseline / RECORD).is_file():
            check_records(samples, baseline)
    labels = [side.labels for side in (images, baselines) if isinstance(side, NpzImages) and side.labels is not None]
    if len(labels) == 2 and not np.array_equal(*labels):
        raise UserError(f"{samples} and {baseline} hold images of different labels; a baseline has the same ones")


def check_records(samples: Path, baseline: Path) -> None:
    """UserError if two sample folders have other noise, labels or weights."""
    own, other = (read_record(folder).settings for folder in (samples, baseline))
    for name in ("global_seed", "labels", "checkpoint"):
        if own.get(name) != other.get(name):
            raise UserError(
                f"{samples} was sampled with {name} {own.get(name)} and {baseline} with {other.get(name)}; a baseline "
                "differs in the caching alone"
            )


def step_errors(cached: Sampler, full: Sampler, indices: Sequence[int]) -> np.ndarray:
    """‖x_cached − x_full‖ / ‖x_full‖ of the images with these numbers after every step: (steps, n), float64.

    Each batch is drawn twice; the states of one are held, float64, on the CPU.
    """
    parts = []
    for start in range(0, len(indices), BATCH):
        batch = list(indices[start : start + BATCH])
        states: list[Tensor] = []
        full.draw(batch, observe=lambda step, x, states=states: states.append(x.to("cpu", copy=True)))
        errors: list[Tensor] = []

        def compare(step: int, x: Tensor, states=states, errors=errors) -> None:
            difference = (x.cpu() - states[step]).flatten(1).norm(dim=1)
            errors.append(difference / states[step].flatten(1).norm(dim=1))

        cached.draw(batch, observe=compare)
        parts.append(torch.stack(errors))
    return torch.cat(parts, dim=1).double().numpy()


def summarise_steps(errors: np.ndarray) -> list[dict[str, float]]:
    """Of errors (steps, n): step, mean and largest over the images, for records."""
    return [{"step": step, "mean": float(row.mean()), "largest": float(row.max())} for step, row in enumerate(errors)]
