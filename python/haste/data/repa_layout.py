"""REPA's layout: pictures that are cropped already, and beside them the moments of their latents.

    images/00000/img00000000.png               or images.zip with the same inside
    vae-sd/00000/img-mean-std-00000000.npy     or vae-sd.zip; (2C, S, S): means, then standard deviations
    vae-sd/dataset.json                        {"labels": [["00000/img-mean-std-00000000.npy", 6], ...]}

or one zip with all of it. Where `haste prepare` wrote it, prepare.json tells the VAE; otherwise Stable Diffusion's is
meant.
"""

from __future__ import annotations

import logging

import numpy as np

from haste.data.archive import Archive
from haste.data.bad_files import BadFile, OnBadFile
from haste.data.latent_data import LatentData
from haste.data.pictures import is_picture
from haste.data.sources import LABEL_FILE, LATENTS, choose_labels, listed_labels
from haste.data.training_data import count_classes
from haste.errors import UserError
from haste.io import parse_json
from haste.vae import SD_LATENTS, LatentFormat

logger = logging.getLogger(__name__)

IMAGES, RECORD = "images", "prepare.json"


def image_name(number: int) -> str:
    """The file of a picture inside images/: a thousand to a folder."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def latent_name(number: int) -> str:
    """The file of a picture's moments inside vae-sd/."""
    return f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"


def open_repa_layout(
    root: Archive,
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> LatentData:
    """The pictures and latents under `root`, which has a vae-sd; arguments as for load_dataset.

    Labels are those of vae-sd/dataset.json, or else of images/dataset.json; where they are null there is one class.
    """
    images, latents = root.child(IMAGES), root.child(LATENTS)
    if images is None:
        raise UserError(f"{root.locate(LATENTS)} lies there without {root.locate(IMAGES)}; it must be there too")
    picture_names = [name for name in images.names() if is_picture(name)]
    moment_names = [name for name in latents.names() if name.endswith(".npy")]
    pairs = pair_files(picture_names, moment_names)
    if not pairs:
        raise UserError(f"{root.locate(LATENTS)} and {root.locate(IMAGES)} hold no picture with its latents")
    paired = set(pairs.values())
    lone = [images.locate(name) for name in picture_names if name not in paired]
    lone += [latents.locate(name) for name in moment_names if name not in pairs]
    by_picture = images.has(LABEL_FILE) and not latents.has(LABEL_FILE)
    labelled, found = (images, picture_names) if by_picture else (latents, moment_names)
    listed = listed_labels(labelled)
    lone += [labelled.locate(name) for name in (listed or {}).keys() - set(found)]
    _judge_missing(lone, on_bad_file)
    pictures, moments = list(pairs.values()), list(pairs)
    labels = choose_labels(listed, pictures if by_picture else moments, labelled.locate(LABEL_FILE))
    if labels is None:
        logger.info("%s has no labels: all its pictures are one class", root.locate(LATENTS))
        labels = np.zeros(len(pairs), dtype=np.int64)
    classes = count_classes(num_classes, int(labels.max()) + 1)
    vae_latents = _format(root, vae, vae_stats)
    data = LatentData((images, pictures), (latents, moments), labels, resolution, classes, vae_latents, on_bad_file)
    data.class_names = recorded_names(root)
    return data


def pair_files(picture_names: list[str], moment_names: list[str]) -> dict[str, str]:
    """From each moments file, in order, to its picture: by name, or, where no two names agree, by position, as REPA's
    own loader does throughout."""
    pictures = {_key(name): name for name in picture_names}
    pairs = {name: pictures[_key(name)] for name in moment_names if _key(name) in pictures}
    if not pairs and len(picture_names) == len(moment_names):
        return dict(zip(moment_names, picture_names, strict=True))
    return pairs


def _key(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("-mean-std-", "")


def _judge_missing(lone: list[str], on_bad_file: OnBadFile) -> None:
    """Refuse, or name and count, files without which another one is of no use."""
    if not lone:
        return
    what = f"{len(lone)} files have no counterpart in {IMAGES}, {LATENTS} or {LABEL_FILE}, the first being {min(lone)}"
    if on_bad_file == "refuse":
        raise UserError(f"{what}; restore them, or pass over such files with --on-bad-file skip")
    logger.warning("skipped: %s", what)


def _format(root: Archive, vae: str | None, vae_stats: str | None) -> LatentFormat:
    """The VAE that was asked for, or the recorded one, or Stable Diffusion's."""
    recorded = recorded_format(root)
    latents = LatentFormat.of(vae) if vae is not None else recorded or SD_LATENTS
    if recorded is not None and (recorded.channels, recorded.factor) != (latents.channels, latents.factor):
        raise UserError(f"--vae is {vae}; it must be one like {recorded.vae}, which has made {root.locate(LATENTS)}")
    return latents if vae_stats is None else latents.with_statistics(vae_stats)


def recorded_format(root: Archive) -> LatentFormat | None:
    """What prepare.json says of the latents; None without one."""
    if not root.has(RECORD):
        return None
    where = root.locate(RECORD)
    try:
        data = root.read(RECORD)
    except BadFile as fault:
        raise UserError(f"{fault}; it must be the record of haste prepare") from fault
    latents = parse_json(data, where, "the record of haste prepare", needs=["latents"])["latents"]
    return None if latents is None else LatentFormat.from_dict(latents, f"latents in {where}")


def recorded_names(root: Archive) -> list[str] | None:
    """The names of the classes that prepare.json has; None without them."""
    if not root.has(RECORD):
        return None
    names = parse_json(root.read(RECORD), root.locate(RECORD), "the record of haste prepare").get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
