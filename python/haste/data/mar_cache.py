"""MAR's cached latents, of its main_cache.py:

    CACHE/<class folder>/<image file name>.npz     moments, moments_flip: (2C, S, S) float32

the mean and the logarithm of the variance of an image's latents, and those of its mirror image. A teacher's images are
joined by the path inside the cache, which is the image's with .npz behind it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import Archive, decode_npz, open_archive
from haste.data.dataset import Batch, TrainingData, count_classes, fingerprint, require_image_dir, to_unit
from haste.data.images import center_crop, decode_image, is_image
from haste.data.latents import as_moments
from haste.data.sources import FileSource, labels_of_folders
from haste.errors import BadFile, OnBadFile
from haste.vae import KL16_LATENTS, LatentFormat, with_deviation

SUFFIX = ".npz"
KEYS = ("moments", "moments_flip")


def cached_names(names: list[str]) -> list[str]:
    """The files of a cache among all files of a folder; empty if it is none, such as one of images."""
    arrays = [name for name in names if name.endswith(SUFFIX)]
    of_images = [name for name in arrays if is_image(name.removesuffix(SUFFIX))]
    return of_images or ([] if any(map(is_image, names)) else arrays)


def open_cache(
    archive: Archive,
    names: list[str],
    path: Path,
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    image_dir: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> CachedLatentData:
    """Open a cache of these files. Labels are the class folders in sorted order.

    Raises:
        UserError: settings that do not fit, or with "refuse" a first file that cannot be used.
    """
    latents = KL16_LATENTS if vae is None else LatentFormat.of(vae)
    latents = latents if vae_stats is None else latents.with_statistics(vae_stats)
    labels, classes = labels_of_folders(names, path, "--data-dir")
    labels = np.zeros(len(names), dtype=np.int64) if labels is None else labels
    images = None
    if image_dir is not None:
        image_names = [name.removesuffix(SUFFIX) for name in names]
        images = FileSource(open_archive(Path(image_dir).expanduser(), "--image-dir"), image_names)
    found = count_classes(num_classes, int(labels.max()) + 1)
    data = CachedLatentData(FileSource(archive, names), images, labels, resolution, found, latents, on_bad_file)
    data.class_names = classes
    return data


class CachedLatents(NamedTuple):
    """pixels: uint8, (3, R, R), or empty without a teacher; moments: float32, (2, 2C, S, S), of the image and of its
    mirror image; label: int64, ()."""

    pixels: Tensor
    moments: Tensor
    label: Tensor


class CachedLatentData(TrainingData):
    """Latents of images or of their mirror images, which is chosen, and sampled, at each use.

    Args:
        images: one for each file of `moments`, in the same order, of any size; None without.
    """

    unmirrored = "MAR's cached latents, which are those of the mirror image at half of their uses already"

    def __init__(
        self,
        moments: FileSource,
        images: FileSource | None,
        labels: np.ndarray,
        resolution: int,
        num_classes: int,
        latents: LatentFormat,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, latents, on_bad_file=on_bad_file)
        self._format = latents
        self._moments, self._images, self._labels = moments, images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(len(self), self._moments.listing(), self._labels, self._moments.read)

    def __getitem__(self, index: int) -> CachedLatents:
        pixels = np.empty(0, dtype=np.uint8) if self._images is None else self._read_image(self._images, index)
        moments = self._read_moments(index)
        return CachedLatents(torch.from_numpy(pixels), torch.from_numpy(moments), torch.tensor(self._labels[index]))

    def _read_image(self, images: FileSource, index: int) -> np.ndarray:
        return center_crop(decode_image(images.read(index), images.name(index)), self.resolution)

    def _read_moments(self, index: int) -> np.ndarray:
        where, shape = self._moments.name(index), (2 * self.channels, self.input_size, self.input_size)
        arrays = decode_npz(self._moments.read(index), KEYS, where)
        both = []
        for key in KEYS:
            if key not in arrays:
                raise BadFile(where, f"must hold the arrays {' and '.join(KEYS)}, got no {key}")
            moments = as_moments(arrays[key], where)
            if moments.shape != shape:
                wanted, found = (" x ".join(map(str, sizes)) for sizes in (shape, moments.shape))
                fits = f"for --resolution {self.resolution} and the --vae {self._format.vae}"
                raise BadFile(where, f"must hold {wanted} numbers {fits}, got {found}")
            both.append(moments)
        return np.stack(both)

    def to_batch(self, raw: CachedLatents, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        """One of the two with probability 1/2; the image is mirrored where moments_flip is taken."""
        moments = raw.moments.to(device, non_blocking=True)
        rows = torch.arange(len(moments), device=device)
        mirrored = torch.rand(len(moments), generator=generator, device=device) < 0.5
        inputs = self._format.sample_posterior(with_deviation(moments[rows, mirrored.long()]), generator)
        images = None
        if self._images is not None:
            pixels = to_unit(raw.pixels.to(device, non_blocking=True))
            images = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return Batch(inputs, images, raw.label.to(device, non_blocking=True))

    def require_images(self) -> None:
        folder = os.path.commonpath([self._moments.name(0), self._moments.name(len(self) - 1)])
        require_image_dir(self._images, f"below {folder}", self._read_image, self.on_bad_file)

    def without_images(self) -> CachedLatentData:
        data = self._copy()
        data._images = None
        return data
