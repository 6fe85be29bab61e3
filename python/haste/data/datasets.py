"""From --data-dir to training data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from haste.data.archive import Archive, Folder, open_archive
from haste.data.bad_files import BadFile, OnBadFile, refusal
from haste.data.digits import load_digits
from haste.data.memory import InMemoryData
from haste.data.picture_data import PictureData
from haste.data.repa_layout import IMAGES, LATENTS, open_repa_layout
from haste.data.sources import open_pictures
from haste.data.training_data import TrainingData, count_classes
from haste.errors import UserError
from haste.vae import VAE, LatentFormat

logger = logging.getLogger(__name__)

IN_MEMORY = {"digits": load_digits}


def load_dataset(
    data_dir: str,
    resolution: int,
    *,
    vae: str | None = None,
    vae_stats: str | None = None,
    on_bad_file: OnBadFile = "refuse",
    num_classes: int | None = None,
) -> TrainingData:
    """The training data that --data-dir names.

    data_dir: the name of a small set that is kept in memory; a folder or zip in REPA's layout, whose latents are used;
        or a folder, zip or Hugging Face data set of pictures, which are cropped as ADM does.
    vae: mse, ema, a hub name or a folder. Pictures without latents are encoded on the training device, or, where it is
        None, learned as pixels. For REPA's layout it tells scale and shift, which are Stable Diffusion's by default.
    vae_stats: a file with the mean and standard deviation of each latent channel, in place of the VAE's own scale.
    on_bad_file: "refuse" files that cannot be used, or "skip" them: another picture stands in.
    num_classes: of the student; None counts the data's.

    Raises UserError for data that does not exist or does not fit these settings.
    """
    if data_dir in IN_MEMORY:
        return _load_in_memory(data_dir, resolution, num_classes)
    path = Path(data_dir).expanduser()
    if not data_dir or not os.path.exists(path):
        known = ", ".join(IN_MEMORY)
        raise UserError(f"--data-dir is {data_dir!r}; it must be a folder, a zip, or one of: {known}")
    archive = open_archive(path, "--data-dir")
    if archive.child(LATENTS) is not None:
        data = open_repa_layout(archive, resolution, vae, vae_stats, on_bad_file, num_classes)
    else:
        data = _open_plain(archive, path, resolution, vae, vae_stats, on_bad_file, num_classes)
    _try_first(data)
    return data


def _load_in_memory(name: str, resolution: int, num_classes: int | None) -> InMemoryData:
    images, labels = IN_MEMORY[name]()
    if resolution != images.shape[-1]:
        raise UserError(f"--resolution is {resolution}; it must be {images.shape[-1]}, like the {name} pictures")
    return InMemoryData(images, labels, count_classes(num_classes, int(labels.max()) + 1))


def _open_plain(
    archive: Archive,
    path: Path,
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> PictureData:
    if vae is None and vae_stats is not None:
        raise UserError(f"--vae-stats is {vae_stats}, but there are no latents; give --vae as well")
    if archive.child(IMAGES) is not None:
        _refuse_unread_arrays(archive, path)
    source = open_pictures(path, "--data-dir")
    if source.labels is None:
        logger.info("%s has no labels: all its pictures are one class", path)
    encoder = VAE(LatentFormat.of(vae, vae_stats)) if vae is not None else None
    return PictureData(source, resolution, count_classes(num_classes, source.num_classes), encoder, on_bad_file)


def _refuse_unread_arrays(archive: Archive, path: Path) -> None:
    """UserError for latents under another name than that of REPA's layout: a run would learn the pixels beside them."""
    names = archive.names()
    folders = [name.split("/", 1)[0] for name in names if name.endswith(".npy") and "/" in name]
    zips = [name for name in names if name.endswith(".zip") and "/" not in name]
    for packed in zips if isinstance(archive, Folder) else ():
        if any(name.endswith(".npy") for name in open_archive(path / packed, "--data-dir").names()):
            folders.append(packed)
    if folders:
        raise UserError(
            f"--data-dir is {path}, where {min(folders)} holds .npy files that would not be read; latents must lie in "
            f"{LATENTS} beside {IMAGES}, and to learn from pixels, --data-dir must be a folder of images alone"
        )


def _try_first(data: TrainingData) -> None:
    """A wrong --resolution spoils every file: it is told now, before teachers and student are made."""
    try:
        data[0]
    except BadFile as fault:
        if data.on_bad_file == "refuse":
            raise UserError(refusal(fault)) from fault
