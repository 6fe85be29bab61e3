"""Fidelity of a cached run to its uncached baseline, which has the same images sampled with every step in full.

Images: PSNR, 10·log₁₀(255² / mean squared error), and SSIM (Wang et al., 2004), both as scikit-image computes them.
States: the relative error ‖x_cached − x_full‖ / ‖x_full‖ of each image's state after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.data.images import ImageArray, ImageFiles, ImageSet, NpzImages, open_images
from haste.distributed import progress_bar
from haste.errors import UserError, require
from haste.generation.pipeline import Sampler
from haste.generation.sample_dir import RECORD, read_record

WORST = 0.05  # the share of the images that count as the worst
GAUSSIAN_WINDOW = 11  # pixels per side of the published window of SSIM
SMALL_WINDOW = 7  # of equal weights, for smaller images
BATCH = 64


@dataclass(frozen=True)
class Fidelity:
    """psnr (N,) in dB, infinite for identical images, and ssim (N,), at most 1, of each image to its baseline."""

    psnr: np.ndarray
    ssim: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means, and means over the worst 5 % (at least one). PSNR is over images that differ; None if none do."""
        differ = self.psnr[np.isfinite(self.psnr)]
        return {
            "images": len(self.psnr),
            "identical": int(len(self.psnr) - len(differ)),
            "psnr": float(differ.mean()) if len(differ) else None,
            "psnr_worst": _mean_of_worst(differ) if len(differ) else None,
            "ssim": float(self.ssim.mean()),
            "ssim_worst": _mean_of_worst(self.ssim),
        }

    def pooled(self) -> dict[str, float | None]:
        """psnr of the mean squared error over all images (None if all are identical), and the mean ssim."""
        error = np.mean(10.0 ** (-self.psnr / 10.0))  # mean squared error over 255²
        return {"psnr": float(-10.0 * np.log10(error)) if error > 0 else None, "ssim": float(self.ssim.mean())}


def _mean_of_worst(values: np.ndarray) -> float:
    return float(np.sort(values)[: max(round(WORST * len(values)), 1)].mean())


def compare_images(
    images: np.ndarray | ImageSet, baseline: np.ndarray | ImageSet, title: str | None = None
) -> Fidelity:
    """Compare images (N, H, W, 3) uint8 one by one, under a progress bar if it has a title. Raises UserError."""
    images, baseline = (ImageArray(side) if isinstance(side, np.ndarray) else side for side in (images, baseline))
    (height, width, _), (other_height, other_width, _) = images.shape, baseline.shape
    if (len(images), height, width) != (len(baseline), other_height, other_width):
        raise UserError(
            f"the baseline must have as many images of the same size, {len(images)} of {width} x {height}, got "
            f"{len(baseline)} of {other_width} x {other_height}"
        )
    if min(height, width) < SMALL_WINDOW:
        raise UserError(
            f"images must have at least {SMALL_WINDOW} x {SMALL_WINDOW} pixels for SSIM, got {width} x {height}"
        )
    psnr, ssim = [], []
    with progress_bar(total=len(images), unit="image", desc=title, disable=title is None) as bar:
        for own, other in zip(images.batches(BATCH), baseline.batches(BATCH), strict=True):
            psnr += [_psnr(*pair) for pair in zip(own, other, strict=True)]
            ssim += [_ssim(*pair) for pair in zip(own, other, strict=True)]
            bar.update(len(own))
    return Fidelity(np.array(psnr), np.array(ssim))


def _psnr(image: np.ndarray, baseline: np.ndarray) -> float:
    """Of one image (H, W, 3) uint8, in dB."""
    with np.errstate(divide="ignore"):  # identical images
        return float(require("skimage.metrics").peak_signal_noise_ratio(baseline, image, data_range=255))


def _ssim(image: np.ndarray, baseline: np.ndarray) -> float:
    """Of one image (H, W, 3) uint8: Gaussian windows of 11 × 11 as published, 7 × 7 in smaller images."""
    if min(image.shape[:2]) >= GAUSSIAN_WINDOW:
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    else:
        window = {"win_size": SMALL_WINDOW}
    similarity = require("skimage.metrics").structural_similarity
    return float(similarity(baseline, image, data_range=255, channel_axis=-1, **window))


def compare_sets(samples: Path, baseline: Path, count: int | None = None) -> Fidelity:
    """Compare two folders or .npz files, all images or the first `count`. Raises UserError for other images."""
    images, others = open_images(samples, "--samples", count), open_images(baseline, "--baseline", count)
    _check_same_images(samples, images, baseline, others)
    return compare_images(images, others, "baseline")


def _check_same_images(samples: Path, images: ImageSet, baseline: Path, others: ImageSet) -> None:
    """UserError unless both sets have the same image numbers, labels, seed and checkpoint, as far as is known."""
    if isinstance(images, ImageFiles) and isinstance(others, ImageFiles):
        numbers, other_numbers = images.numbers() or images.names, others.numbers() or others.names
        differing = sorted(set(map(str, numbers)) ^ set(map(str, other_numbers)))
        if differing:
            raise UserError(
                f"--baseline must hold the same images as {samples}, got {baseline}: {len(differing)} are in one of "
                f"them only, such as {differing[0]}"
            )
        if (samples / RECORD).is_file() and (baseline / RECORD).is_file():
            own, other = (read_record(folder).settings for folder in (samples, baseline))
            for name in ("global_seed", "labels", "prompts", "checkpoint"):
                if own.get(name) != other.get(name):
                    raise UserError(
                        f"--baseline must be sampled with {name} {own.get(name)}, as {samples}, got {other.get(name)} "
                        f"in {baseline}; only the cache may differ"
                    )
    labels = [side.labels for side in (images, others) if isinstance(side, NpzImages) and side.labels is not None]
    if len(labels) == 2 and not np.array_equal(labels[0], labels[1]):
        raise UserError(f"--baseline must hold images of the same labels as {samples}, got {baseline}")
    captions = [side.captions for side in (images, others) if isinstance(side, NpzImages) and side.captions is not None]
    if len(captions) == 2 and captions[0] != captions[1]:
        raise UserError(f"--baseline must hold images of the same captions as {samples}, got {baseline}")


def fidelity_text(summary: dict[str, Any]) -> str:
    """Format a summary of PSNR and SSIM."""
    psnr = "-" if summary["psnr"] is None else f"{summary['psnr']:.2f} dB, worst 5 %: {summary['psnr_worst']:.2f} dB"
    lines = [f"PSNR  {psnr}", f"SSIM  {summary['ssim']:.4f}, worst 5 %: {summary['ssim_worst']:.4f}"]
    if summary["identical"]:
        lines.append(
            f"{summary['identical']:,} of {summary['images']:,} images are identical and not part of the PSNR."
        )
    return "\n".join(lines)


# ---- states after every step ----


def step_errors(cached: Sampler, full: Sampler, indices: Sequence[int]) -> np.ndarray:
    """Relative errors ‖x_cached − x_full‖ / ‖x_full‖ of the states of images after each step: (steps, n), float64."""
    parts = []
    for start in range(0, len(indices), BATCH):
        batch = list(indices[start : start + BATCH])
        states: list[Tensor] = []
        full.sample(batch, observe=lambda step, x, states=states: states.append(x.to("cpu", copy=True)))
        errors: list[Tensor] = []

        def compare(step: int, x: Tensor, states=states, errors=errors) -> None:
            difference = (x.cpu() - states[step]).flatten(1).norm(dim=1)
            errors.append(difference / states[step].flatten(1).norm(dim=1))

        cached.sample(batch, observe=compare)
        parts.append(torch.stack(errors))
    return torch.cat(parts, dim=1).double().numpy()


def summarise_steps(errors: np.ndarray) -> list[dict[str, float]]:
    """The mean and the largest error over the images for each step of errors (steps, images), for records."""
    return [{"step": step, "mean": float(row.mean()), "largest": float(row.max())} for step, row in enumerate(errors)]


def steps_text(errors: np.ndarray) -> str:
    """Format the mean of errors (steps, images) after each quarter of the steps."""
    places = sorted({max(round(share * len(errors)), 1) for share in (0.25, 0.5, 0.75, 1.0)})
    parts = [f"{errors[place - 1].mean():.2e} after step {place}" for place in places]
    return f"Relative error of the state, mean of {errors.shape[1]} images: {', '.join(parts)}."
