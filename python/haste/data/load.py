"""Opening --data-dir: images that are cropped, MAR's cached latents (mar_cache.py), or REPA's layout of images and the
moments of their latents,

    images/00000/img00000000.png               or images.zip with the same inside
    vae-sd/00000/img-mean-std-00000000.npy     or vae-sd.zip; (2C, S, S): means, then standard deviations
    vae-sd/dataset.json                        {"labels": [["00000/img-mean-std-00000000.npy", 6], ...]}

or one zip with all of it. prepare.json of `haste prepare` names the VAE; without it, it is Stable Diffusion's.
"""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path

import numpy as np

from haste.data.archive import Archive, Folder, open_archive
from haste.data.captions import CaptionedImages, InMemoryCaptions, caption_data, find_captions
from haste.data.dataset import ImageData, InMemoryData, LatentData, TrainingData, count_classes
from haste.data.images import is_image
from haste.data.mar_cache import cached_names, open_cache
from haste.data.record import RECORD, latent_format, read_record
from haste.data.sources import LABEL_FILE, LATENTS, FileSource, check_missing, choose_labels, listed_labels, open_source
from haste.errors import BadFile, OnBadFile, UserError
from haste.registry import DATASETS, plugin
from haste.vae import VAE, LatentFormat

logger = logging.getLogger(__name__)

IMAGES = "images"


def image_name(number: int) -> str:
    """The file of an image inside images/, with a thousand files per folder."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def latent_name(number: int) -> str:
    """The file of an image's moments inside vae-sd/."""
    return f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"


def load_dataset(
    data_dir: str,
    resolution: int,
    *,
    vae: str | None = None,
    vae_stats: str | None = None,
    image_dir: str | None = None,
    on_bad_file: OnBadFile = "refuse",
    num_classes: int | None = None,
    random_flip: bool = False,
    cache: Path | None = None,
) -> TrainingData:
    """Open the training data that --data-dir names.

    Args:
        data_dir: the name of a small data set, which is kept in memory; a folder or zip in REPA's layout, whose latents
            are used; a folder or zip of MAR's cached latents; images with features of captions, as `haste prepare
            --captions` or REPA makes them; or a folder, zip or Hugging Face data set of images,
            which are center cropped as in ADM.
        vae: mse, ema, a hub name, a folder or a file of KL-16. Encodes images without latents on the training device;
            None trains on their pixels. With latents it gives scale and shift, which by default are Stable Diffusion's
            in REPA's layout, and KL-16's in MAR's.
        vae_stats: a file with the mean and standard deviation of each latent channel, instead of the VAE's scale.
        image_dir: a folder or zip of the images that MAR's latents were made of, for a teacher.
        on_bad_file: "refuse" files that cannot be used, or "skip" them: another image replaces each.
        num_classes: of the model; None for those of the data.
        random_flip: mirror an image with probability 1/2 at each use.
        cache: where a small data set may keep what it trains, such as a text encoder.

    Raises:
        UserError: the data does not exist or does not fit these settings.
    """
    if data_dir in DATASETS:
        for flag, given in (("vae", vae), ("vae-stats", vae_stats), ("image-dir", image_dir)):
            if given is not None:
                raise UserError(
                    f"--{flag} must be left out with --data-dir {data_dir}, whose pixels are used, got {given}"
                )
        return _open_in_memory(data_dir, resolution, num_classes, random_flip, cache)
    path = Path(data_dir).expanduser()
    if not data_dir or not os.path.exists(path):
        raise UserError(f"--data-dir must be a folder, a zip, or one of: {', '.join(DATASETS)}, got {data_dir!r}")
    archive = open_archive(path, "--data-dir")
    latents = archive.child(LATENTS)
    names = [] if latents is not None else archive.names()
    captions = None if latents is not None else find_captions(archive, names, path, "--data-dir", on_bad_file)
    cached = cached_names(names)
    if image_dir is not None and not cached:
        raise UserError(f"--image-dir must come with MAR's cached latents, got {image_dir} beside the images of {path}")
    data: TrainingData
    if captions is not None:
        where = archive.locate(RECORD)
        data = caption_data(captions, where, resolution, vae, vae_stats, on_bad_file, num_classes)
    elif cached:
        data = open_cache(
            archive, cached, path, resolution, vae, vae_stats, image_dir, on_bad_file, num_classes
        )  # fmt: skip
    elif latents is not None:
        data = _open_repa_layout(archive, latents, resolution, vae, vae_stats, on_bad_file, num_classes)
    else:
        if vae is None and vae_stats is not None:
            raise UserError(f"--vae-stats must come with --vae or latents, got {vae_stats} alone")
        if archive.child(IMAGES) is not None:
            _check_no_other_latents(archive, path)
        source = open_source(path, "--data-dir", on_bad_file)
        if source.labels is None:
            logger.info("%s has no labels: all its images are one class", path)
        encoder = None if vae is None else VAE(LatentFormat.of(vae, vae_stats, resolution))
        data = ImageData(source, resolution, count_classes(num_classes, source.num_classes), encoder, on_bad_file)
    if random_flip:
        data = data.with_random_flip()
    try:
        # Reports a wrong --resolution before teachers and models are built; images of their own are `require_images`'s.
        (data.without_images() if cached else data)[0]
    except BadFile as fault:
        if on_bad_file == "refuse":
            raise fault.as_user_error() from fault
    return data


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


def _check_no_other_latents(archive: Archive, path: Path) -> None:
    """Refuse latents in a folder with another name than REPA's, as the run would be trained on the pixels instead."""
    names = archive.names()
    folders = [name.split("/", 1)[0] for name in names if name.endswith(".npy") and "/" in name]
    zips = [name for name in names if name.endswith(".zip") and "/" not in name]
    for packed in zips if isinstance(archive, Folder) else ():
        if any(name.endswith(".npy") for name in open_archive(path / packed, "--data-dir").names()):
            folders.append(packed)
    if folders:
        raise UserError(
            f"--data-dir must have latents in {LATENTS} beside {IMAGES}, or be a folder of images only to train on "
            f"pixels, got {path}, where {min(folders)} holds .npy files that would not be used"
        )


# ---- REPA's layout ----


def _open_repa_layout(
    root: Archive,
    latents: Archive,
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> LatentData:
    """Open images with latents; labels are from vae-sd/dataset.json, or else images/dataset.json."""
    image_root = root.child(IMAGES)
    if image_root is None:
        raise UserError(f"--data-dir must hold {root.locate(IMAGES)} beside {root.locate(LATENTS)}")
    image_names = [name for name in image_root.names() if is_image(name)]
    moment_names = [name for name in latents.names() if name.endswith(".npy")]
    pairs = pair_files(image_names, moment_names)
    if not pairs:
        raise UserError(f"--data-dir must hold images with their latents: {root.locate(LATENTS)} has none")
    paired = set(pairs.values())
    lone = [image_root.locate(name) for name in image_names if name not in paired]
    lone += [latents.locate(name) for name in moment_names if name not in pairs]
    by_image = image_root.has(LABEL_FILE) and not latents.has(LABEL_FILE)
    labelled, found = (image_root, image_names) if by_image else (latents, moment_names)
    listed = listed_labels(labelled)
    lone += [labelled.locate(name) for name in (listed or {}).keys() - set(found)]
    where = f"{IMAGES}, {LATENTS} or {LABEL_FILE}"
    check_missing(f"{len(lone)} files have no counterpart in {where}", lone, on_bad_file)
    images, moments = list(pairs.values()), list(pairs)
    labels = choose_labels(listed, images if by_image else moments, labelled.locate(LABEL_FILE))
    if labels is None:
        logger.info("%s has no labels: all its images are one class", root.locate(LATENTS))
        labels = np.zeros(len(pairs), dtype=np.int64)
    classes = count_classes(num_classes, int(labels.max()) + 1)
    record = read_record(root)
    form = latent_format(record, root.locate(RECORD), vae, vae_stats)
    pair = FileSource(image_root, images), FileSource(latents, moments)
    data = LatentData(*pair, labels, resolution, classes, form, on_bad_file)
    names = record.get("class_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        data.class_names = names
    return data


def pair_files(image_names: list[str], moment_names: list[str]) -> dict[str, str]:
    """Map each moments file to its image: by name, or, if no names match, by position, as REPA's own loader does."""
    images = {_key(name): name for name in image_names}
    pairs = {name: images[_key(name)] for name in moment_names if _key(name) in images}
    if not pairs and len(image_names) == len(moment_names):
        return dict(zip(moment_names, image_names, strict=True))
    return pairs


def _key(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("-mean-std-", "")
