"""Opening --data-dir, whatever it names: a small set in memory, images that are cropped when they are read, REPA's
layout of images and latents (repa_layout.py), MAR's cached latents (mar_cache.py), LightningDiT's shards of latents
(lightningdit.py), or images with captions."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path

from haste.data.archive import open_archive
from haste.data.captions import CaptionedImages, InMemoryCaptions, caption_data, find_captions
from haste.data.dataset import ImageData, InMemoryData, TrainingData, count_classes
from haste.data.latent_folders import choose_latents
from haste.data.lightningdit import find_shards, open_shards
from haste.data.mar_cache import cached_names, open_cache
from haste.data.record import RECORD, read_record
from haste.data.repa_layout import open_repa_layout
from haste.data.sources import open_source
from haste.data.tars import find_tars
from haste.errors import BadFile, OnBadFile, UserError
from haste.registry import DATASETS, plugin
from haste.vae import VAE, LatentFormat

logger = logging.getLogger(__name__)


def load_dataset(
    data_dir: str,
    resolution: int,
    *,
    vae: str | None = None,
    vae_stats: str | None = None,
    latents_dir: str | None = None,
    image_dir: str | None = None,
    on_bad_file: OnBadFile = "refuse",
    num_classes: int | None = None,
    random_flip: bool = False,
    cache: Path | None = None,
) -> TrainingData:
    """Open the training data that --data-dir names.

    Args:
        data_dir: the name of a small data set, which is kept in memory; a folder or zip in REPA's layout, whose latents
            are used; a folder or zip of MAR's cached latents; a folder of LightningDiT's shards of latents; images with
            features of captions, as `haste prepare --captions` or REPA makes them; or a folder, zip, Hugging Face
            data set or tars of images, which are center cropped as in ADM.
        vae: mse, ema, a hub name, a folder or a file of KL-16. Encodes images without latents on the training device;
            None trains on their pixels. With latents it gives scale and shift, which by default are Stable Diffusion's
            in REPA's layout, and KL-16's in MAR's.
        vae_stats: a file with the mean and standard deviation of each latent channel, instead of the VAE's scale.
        latents_dir: the folder of latents beside images/ of REPA's layout; None for vae-sd.
        image_dir: a folder or zip of the images that MAR's or LightningDiT's latents were made of, for a teacher.
        on_bad_file: "refuse" files that cannot be used, or "skip" them: another image replaces each.
        num_classes: of the model; None for those of the data.
        random_flip: mirror an image with probability 1/2 at each use, or take the latents of its mirror image.
        cache: where a small data set may keep what it trains, such as a text encoder.

    Raises:
        UserError: the data does not exist or does not fit these settings.
    """
    if data_dir in DATASETS:
        of_files = {"vae": vae, "vae-stats": vae_stats, "latents-dir": latents_dir, "image-dir": image_dir}
        for flag, given in of_files.items():
            if given is not None:
                raise UserError(
                    f"--{flag} must be left out with --data-dir {data_dir}, whose pixels are used, got {given}"
                )
        return _open_in_memory(data_dir, resolution, num_classes, random_flip, cache)
    path = Path(data_dir).expanduser()
    if not data_dir or not os.path.exists(path):
        raise UserError(f"--data-dir must be a folder, a zip, or one of: {', '.join(DATASETS)}, got {data_dir!r}")
    shards = find_shards(path)
    if shards:
        if latents_dir is not None:
            raise UserError(f"--latents-dir must be left out with LightningDiT's shards, got {latents_dir}")
        sharded = open_shards(path, shards, resolution, vae, vae_stats, image_dir, on_bad_file, num_classes)
        return _ready(sharded.with_random_flip() if random_flip else sharded, without_images=True)
    if os.path.isfile(path) and find_tars(path):
        for flag, given in (("latents-dir", latents_dir), ("image-dir", image_dir)):
            if given is not None:
                raise UserError(f"--{flag} must be left out with a tar of images, got {given}")
        packed = _open_images(path, resolution, vae, vae_stats, on_bad_file, num_classes)
        return _ready(packed.with_random_flip() if random_flip else packed, without_images=False)
    archive = open_archive(path, "--data-dir")
    record = read_record(archive)
    latents = choose_latents(archive, path, latents_dir, record)
    names = [] if latents is not None else archive.names()
    captions = None if latents is not None else find_captions(archive, names, path, "--data-dir", on_bad_file)
    cached = cached_names(names)
    if image_dir is not None and not cached:
        raise UserError(
            f"--image-dir must come with MAR's cached latents or LightningDiT's, got {image_dir} beside {path}"
        )
    data: TrainingData
    if captions is not None:
        where = archive.locate(RECORD)
        data = caption_data(captions, where, resolution, vae, vae_stats, on_bad_file, num_classes)
    elif cached:
        data = open_cache(
            archive, cached, path, resolution, vae, vae_stats, image_dir, on_bad_file, num_classes
        )  # fmt: skip
    elif latents is not None:
        data = open_repa_layout(
            archive, latents, record, resolution, vae, vae_stats, on_bad_file, num_classes, random_flip
        )
    else:
        data = _open_images(path, resolution, vae, vae_stats, on_bad_file, num_classes)
    if random_flip:
        data = data.with_random_flip()
    return _ready(data, without_images=bool(cached))


def _ready(data: TrainingData, without_images: bool) -> TrainingData:
    """The data, of which one sample is read, so that a wrong --resolution is reported before teachers and models are
    built. Images of --image-dir are `require_images`'s. Raises UserError."""
    try:
        (data.without_images() if without_images else data)[0]
    except BadFile as fault:
        if data.on_bad_file == "refuse":
            raise fault.as_user_error() from fault
    return data


def _open_images(
    path: Path, resolution: int, vae: str | None, vae_stats: str | None, on_bad_file: OnBadFile, num_classes: int | None
) -> ImageData:
    """Images that are cropped when they are read."""
    if vae is None and vae_stats is not None:
        raise UserError(f"--vae-stats must come with --vae or latents, got {vae_stats} alone")
    source = open_source(path, "--data-dir", on_bad_file)
    if source.labels is None:
        logger.info("%s has no labels: all its images are one class", path)
    encoder = None if vae is None else VAE(LatentFormat.of(vae, vae_stats, resolution))
    return ImageData(source, resolution, count_classes(num_classes, source.num_classes), encoder, on_bad_file)


def _open_in_memory(
    name: str, resolution: int, num_classes: int | None, random_flip: bool, cache: Path | None
) -> TrainingData:
    """A small data set by name: images with labels, or with captions."""
    load = plugin(DATASETS, name)
    found = load(cache) if inspect.signature(load).parameters else load()
    images = found[0]
    if resolution != images.shape[-1]:
        raise UserError(f"--resolution must be {images.shape[-1]}, as the {name} images, got {resolution}")
    if isinstance(found, CaptionedImages):
        if random_flip:  # before all captions are encoded
            raise UserError(f"--random-flip must be left out for {InMemoryCaptions.unmirrored}")
        return InMemoryCaptions.of(found)
    labels = found[1]
    data = InMemoryData(images, labels, count_classes(num_classes, int(labels.max()) + 1))
    return data.with_random_flip() if random_flip else data
