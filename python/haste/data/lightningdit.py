"""LightningDiT's latents, of its extract_features.py:

    latents_rankRR_shardSSS.safetensors    latents, latents_flip: (n, C, S, S), of images and of their mirror images;
                                           labels: (n,); of process RR
    latents_stats.pt                       mean, std: (1, C, 1, 1)

Latents are sampled when they are written, and trained on as (z − mean)/std, which is its latent_multiplier 1. Process r
of R has the images r, r + R, ... of torchvision's ImageFolder, and the first ones again until all have equally many.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from haste.data.archive import open_archive
from haste.data.dataset import Batch, TrainingData, count_classes, fingerprint, require_image_dir, to_unit
from haste.data.images import center_crop, decode_image, is_image
from haste.data.latents import Latents, as_moments, sample_stored
from haste.data.shards import ShardFiles
from haste.data.sources import FileSource, check_missing, labels_of_folders
from haste.errors import BadFile, OnBadFile, UserError
from haste.io import MOST_CLASSES
from haste.vae import LatentFormat

logger = logging.getLogger(__name__)

STATISTICS = "latents_stats.pt"
NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
LATENTS, MIRRORED, LABELS = "latents", "latents_flip", "labels"
# Of VA-VAE's release, the latents' usual VAE. It is on no hub that is asked: without --vae it is looked for here.
VA_VAE = "vavae-imagenet256-f16d32-dinov2.pt"


def find_shards(path: Path) -> list[Path]:
    """The shards in a folder, in LightningDiT's order; empty if there are none."""
    return sorted(file for file in path.glob("latents*.safetensors") if file.is_file())


class Shard(NamedTuple):
    """path; mirrored: whether it has latents_flip; shape: (C, S, S); labels: (n,), int64."""

    path: Path
    mirrored: bool
    shape: tuple[int, ...]
    labels: np.ndarray


def open_shards(
    path: Path,
    paths: list[Path],
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    image_dir: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> ShardedLatentData:
    """Open these shards of the folder `path`.

    Raises:
        UserError: settings or images that do not fit, or with "refuse" missing or damaged shards.
    """
    missing = [str(path / name) for name in _gaps([file.name for file in paths])]
    check_missing(f"{len(missing)} shards of {path} are missing", missing, on_bad_file)
    files = ShardFiles("pt")
    shards: list[Shard] = []
    for file in paths:
        try:
            shard = read_shard(files, file)
            if shards and shard.shape != shards[0].shape:
                wanted, found = (_by(each.shape) for each in (shards[0], shard))
                raise BadFile(str(file), f"must hold latents of {wanted}, as {shards[0].path.name}, got {found}")
            shards.append(shard)
        except BadFile as fault:
            if on_bad_file == "refuse":
                raise fault.as_user_error() from fault
            logger.warning("skipped: %s", fault)
    if not shards:
        raise UserError(f"--data-dir must hold shards of latents that can be read, got none in {path}")
    form = _format(path, shards[0].shape, resolution, vae, vae_stats)
    if not missing and len(shards) == len(paths):
        _check_processes(path, shards, on_bad_file)
    labels = np.concatenate([shard.labels for shard in shards])
    images = None
    if image_dir is not None:
        if missing or len(shards) < len(paths):
            raise UserError(f"--image-dir must be left out where shards are skipped, got {image_dir}")
        images = join_images(Path(image_dir).expanduser(), shards)
    classes = count_classes(num_classes, int(labels.max()) + 1)
    return ShardedLatentData(shards, images, labels, resolution, classes, form, on_bad_file)


def _gaps(names: list[str]) -> list[str]:
    """The shards that are missing between others of their process, and the first ones of missing processes."""
    last: dict[int, int] = {}
    for found in filter(None, map(NAME.fullmatch, names)):
        last[int(found[1])] = max(last.get(int(found[1]), 0), int(found[2]))
    every = {
        f"latents_rank{rank:02d}_shard{number:03d}.safetensors"
        for rank in range(max(last, default=-1) + 1)
        for number in range(last.get(rank, 0) + 1)
    }
    return sorted(every.difference(names))


def _check_processes(path: Path, shards: list[Shard], on_bad_file: OnBadFile) -> None:
    """Refuse, or log, processes with fewer latents than others: their last shards are missing, as DistributedSampler
    gives all equally many."""
    held: dict[str, int] = defaultdict(int)
    for shard in shards:
        held[shard.path.name.rpartition("_")[0]] += len(shard.labels)
    short = [f"those of {name}" for name, count in held.items() if count < max(held.values())]
    check_missing(f"{len(short)} processes have fewer latents in {path} than others", short, on_bad_file)


def read_shard(files: ShardFiles, path: Path) -> Shard:
    """The header and the labels of a shard. Raises BadFile."""
    shape, labelled = files.shape(path, LATENTS), files.shape(path, LABELS)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape or labelled != shape[:1]:
        raise BadFile(str(path), f"must hold latents (n, C, S, S) and labels (n,), got {shape} and {labelled}")
    mirrored = files.has(path, MIRRORED)
    if mirrored and files.shape(path, MIRRORED) != shape:
        raise BadFile(str(path), f"must hold {MIRRORED} as {LATENTS}, {shape}, got {files.shape(path, MIRRORED)}")
    labels = files.array(path, LABELS)
    if labels.is_floating_point() or labels.is_complex() or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise BadFile(str(path), f"must have labels from 0 to {MOST_CLASSES - 1:,}, got others")
    return Shard(path, mirrored, shape[1:], labels.numpy().astype(np.int64))


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _format(
    path: Path, shape: tuple[int, ...], resolution: int, vae: str | None, vae_stats: str | None
) -> LatentFormat:
    """The format of latents of this shape: channels and size from the shards, shift and scale from statistics."""
    channels, side = shape[0], shape[1]
    if resolution % side:
        raise UserError(f"--resolution must be a multiple of {side}, the latents along a side in {path}, got "
                        f"{resolution}")  # fmt: skip
    latents = LatentFormat(VA_VAE, channels, resolution // side, (0.0,) * channels, (1.0,) * channels)
    if vae is not None:
        latents = LatentFormat.of(vae, resolution=resolution)
        found = (latents.channels, latents.input_size(resolution))
        if found != (channels, side):
            raise UserError(f"--vae must have {channels} channels and {side} latents along a side for --resolution "
                            f"{resolution}, as {path}, got {found[0]} and {found[1]} of {vae}")  # fmt: skip
    statistics = path / STATISTICS
    if vae_stats is not None or statistics.is_file():
        return latents.with_statistics(vae_stats if vae_stats is not None else str(statistics))
    if vae is None:
        raise UserError(f"--vae-stats must be the mean and standard deviation of the latents in {path}, which has no "
                        f"{STATISTICS}, got none")  # fmt: skip
    return latents


# ---- images, for a teacher ----


def join_images(path: Path, shards: list[Shard]) -> FileSource:
    """The image of each latent, in the order of the shards.

    Raises:
        UserError: their number or any label is another than the shards'.
    """
    archive = open_archive(path, "--image-dir")
    # ImageFolder sorts classes, then the folders in a class, then files.
    names = [name for name in archive.names() if is_image(name)]
    names.sort(key=lambda name: (name.split("/", 1)[0], name.rpartition("/")[0], name))
    labels, _ = labels_of_folders(names, path, "--image-dir")
    process = [NAME.fullmatch(shard.path.name) for shard in shards]
    ranks = [int(found[1]) if found else 0 for found in process]
    total, count = max(ranks) + 1, sum(len(shard.labels) for shard in shards)
    if labels is None or -(-len(names) // total) * total != count:
        what = f"{len(names)} in class folders" if labels is not None else "none in class folders"
        raise UserError(f"--image-dir must hold the {count} images that the latents were made of, in class folders, "
                        f"got {what} in {path}")  # fmt: skip
    numbers: list[np.ndarray] = []
    seen: dict[int, int] = defaultdict(int)
    for shard, rank in zip(shards, ranks, strict=True):
        position = seen[rank] + np.arange(len(shard.labels))
        seen[rank] += len(shard.labels)
        numbers.append((position * total + rank) % len(names))
        wrong = np.flatnonzero(labels[numbers[-1]] != shard.labels)
        if len(wrong):
            first = int(numbers[-1][wrong[0]])
            found = f"label {labels[first]}, but {shard.labels[wrong[0]]} in {shard.path.name}"
            raise UserError(
                f"--image-dir must hold the images that the latents were made of, in ImageFolder's order, got {path}, "
                f"where {names[first]} has {found}"
            )
    return FileSource(archive, [names[number] for number in np.concatenate(numbers)])


class ShardedLatentData(TrainingData):
    """Latents in shards, of which any row is read by itself.

    Args:
        images: one for each row, in the same order, of any size; None without.
    """

    def __init__(
        self,
        shards: list[Shard],
        images: FileSource | None,
        labels: np.ndarray,
        resolution: int,
        num_classes: int,
        latents: LatentFormat,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, num_classes, latents, on_bad_file=on_bad_file)
        self._format = latents
        self._paths = [shard.path for shard in shards]
        self._ends = np.cumsum([len(shard.labels) for shard in shards])
        self._mirrored = all(shard.mirrored for shard in shards)
        self._images, self._labels = images, labels
        self._files = ShardFiles("pt")
        self._flips = False
        self.unmirrored = f"the latents in {self._paths[0].parent}, of which some shards have no {MIRRORED}"

    def __len__(self) -> int:
        return len(self._labels)

    def _place(self, index: int) -> tuple[Path, int]:
        """The shard of a sample, and the row in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._paths[shard], index - (int(self._ends[shard - 1]) if shard else 0)

    def fingerprint(self) -> dict[str, Any]:
        names = "\n".join(path.name for path in self._paths).encode() + self._ends.tobytes()
        keys = (LATENTS, MIRRORED) if self._flips else (LATENTS,)
        return fingerprint(
            len(self), names, self._labels, lambda index: b"".join(self._latents(index, key).tobytes() for key in keys)
        )

    def __getitem__(self, index: int) -> Latents:
        return self._read(index, mirrored=False)

    def read(self, index: int, chance: int) -> Latents:
        """Of an image, or with random flips by `chance` of its mirror image. Raises BadFile."""
        return self._read(index, mirrored=self._flips and chance % 2 == 1)

    def _read(self, index: int, mirrored: bool) -> Latents:
        pixels = torch.empty(0, dtype=torch.uint8)
        if self._images is not None:
            pixels = torch.from_numpy(self._read_image(self._images, index))
        latents = torch.from_numpy(self._latents(index, MIRRORED if mirrored else LATENTS))
        return Latents(pixels.flip(-1) if mirrored else pixels, latents, torch.tensor(self._labels[index]))

    def _latents(self, index: int, key: str) -> np.ndarray:
        path, row = self._place(index)
        return as_moments(self._files.array(path, key, row).float().numpy(), f"{key} {row} of {path}")

    def _read_image(self, images: FileSource, index: int) -> np.ndarray:
        return center_crop(decode_image(images.read(index), images.name(index)), self.resolution)

    def to_batch(self, raw: Latents, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        inputs = sample_stored(self._format, raw.moments.to(device, non_blocking=True), generator)
        images = None if self._images is None else to_unit(raw.pixels.to(device, non_blocking=True))
        return Batch(inputs, images, raw.label.to(device, non_blocking=True))

    def with_random_flip(self) -> TrainingData:
        if not self._mirrored:
            return super().with_random_flip()
        data = self._copy()
        data._flips = True
        return data

    def require_images(self) -> None:
        require_image_dir(self._images, f"in {self._paths[0].parent}", self._read_image, self.on_bad_file)

    def without_images(self) -> ShardedLatentData:
        data = self._copy()
        data._images = None
        return data
