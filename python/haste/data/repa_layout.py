"""REPA's layout of images and the moments of their latents,

    images/00000/img00000000.png               or images.zip with the same inside
    vae-sd/00000/img-mean-std-00000000.npy     or vae-sd.zip; (2C, S, S): means, then standard deviations
    vae-sd/dataset.json                        {"labels": [["00000/img-mean-std-00000000.npy", 6], ...]}
    vae-sd-flip/                               as vae-sd/, of the mirror images; only for --random-flip

or one zip with all of it. Files of (C, S, S) are latents themselves and are not sampled, such as SR-DiT's
vae-in/00000/img-latents-00000000.npy. prepare.json of `haste prepare` names the VAE; without it, it is Stable
Diffusion's.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from haste.data.archive import Archive
from haste.data.dataset import count_classes
from haste.data.images import is_image
from haste.data.latent_folders import FLIP, IMAGES
from haste.data.latents import LatentData
from haste.data.record import RECORD, latent_format
from haste.data.sources import LABEL_FILE, FileSource, check_missing, choose_labels, listed_labels
from haste.errors import OnBadFile, UserError

logger = logging.getLogger(__name__)


def image_name(number: int) -> str:
    """The file of an image inside images/, with a thousand files per folder."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def latent_name(number: int) -> str:
    """The file of an image's moments inside vae-sd/."""
    return f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"


def open_repa_layout(
    root: Archive,
    name: str,
    record: dict[str, Any],
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
    mirrored: bool,
) -> LatentData:
    """Open images with latents; labels are from vae-sd/dataset.json, or else images/dataset.json.

    Args:
        name: of the folder or zip of latents.
        record: prepare.json's content; empty without one.
        mirrored: whether to open the latents of the mirror images, if there are any.

    Raises:
        UserError: files or settings that do not fit.
    """
    image_root, latents = root.child(IMAGES), root.child(name)
    if image_root is None or latents is None:
        raise UserError(f"--data-dir must hold {root.locate(IMAGES)} beside {root.locate(name)}")
    image_names = [file for file in image_root.names() if is_image(file)]
    moment_names = [file for file in latents.names() if file.endswith(".npy")]
    pairs = pair_files(image_names, moment_names)
    if not pairs:
        raise UserError(f"--data-dir must hold images with their latents: {root.locate(name)} has none")
    paired = set(pairs.values())
    lone = [image_root.locate(file) for file in image_names if file not in paired]
    lone += [latents.locate(file) for file in moment_names if file not in pairs]
    flipped = root.child(name + FLIP) if mirrored else None
    if flipped is not None:
        lone += _without_mirror_image(pairs, latents, flipped)
    by_image = image_root.has(LABEL_FILE) and not latents.has(LABEL_FILE)
    labelled, found = (image_root, image_names) if by_image else (latents, moment_names)
    listed = listed_labels(labelled)
    lone += [labelled.locate(file) for file in (listed or {}).keys() - set(found)]
    where = f"{IMAGES}, {name}{f', {name}{FLIP}' if flipped is not None else ''} or {LABEL_FILE}"
    check_missing(f"{len(lone)} files have no counterpart in {where}", lone, on_bad_file)
    images, moments = list(pairs.values()), list(pairs)
    labels = choose_labels(listed, images if by_image else moments, labelled.locate(LABEL_FILE))
    if labels is None:
        logger.info("%s has no labels: all its images are one class", root.locate(name))
        labels = np.zeros(len(pairs), dtype=np.int64)
    classes = count_classes(num_classes, int(labels.max()) + 1)
    form = latent_format(record, root.locate(RECORD), vae, vae_stats)
    mirror_images = None if flipped is None else FileSource(flipped, moments)
    files = FileSource(image_root, images), FileSource(latents, moments), mirror_images
    data = LatentData(*files, labels, resolution, classes, form, on_bad_file)
    data.unmirrored = (
        f"the latents in {root.locate(name)} without {name}{FLIP}, those of the mirror images, which haste prepare "
        "--flip writes beside them"
    )
    names = record.get("class_names")
    if isinstance(names, list) and all(isinstance(class_name, str) for class_name in names):
        data.class_names = names
    return data


def _without_mirror_image(pairs: dict[str, str], latents: Archive, flipped: Archive) -> list[str]:
    """Remove pairs whose latents have no counterpart of the mirror image; the files of either without the other."""
    mirrored = {file for file in flipped.names() if file.endswith(".npy")}
    lone = [flipped.locate(file) for file in mirrored - pairs.keys()]
    for file in [file for file in pairs if file not in mirrored]:
        lone.append(latents.locate(file))
        del pairs[file]
    return lone


def pair_files(image_names: list[str], moment_names: list[str]) -> dict[str, str]:
    """Map each moments file to its image: by name, or, if no names match, by position, as REPA's own loader does."""
    images = {_key(name): name for name in image_names}
    pairs = {name: images[_key(name)] for name in moment_names if _key(name) in images}
    if not pairs and len(image_names) == len(moment_names):
        return dict(zip(moment_names, image_names, strict=True))
    return pairs


def _key(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("-mean-std-", "").replace("-latents-", "")
