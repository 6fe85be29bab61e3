"""The folders of latents beside images/: the one that a run uses, and those that it would pass over.

    images/         the images, or images.zip with the same inside
    vae-sd/         their latents, or another name that --latents-dir gives, such as SR-DiT's vae-in/; or a zip
    vae-sd-flip/    the latents of the mirror images, for --random-flip

or one zip with all of it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from haste.data.archive import Archive, Folder, is_visible
from haste.data.images import is_image
from haste.errors import UserError
from haste.validation import check

IMAGES, LATENTS = "images", "vae-sd"  # of REPA's layout
FLIP = "-flip"  # behind the name of the folder


def choose_latents(root: Archive, path: Path, given: str | None, record: dict[str, Any]) -> str | None:
    """The name of the folder of latents to train on; None if there is none.

    Args:
        root: what --data-dir names, `path`.
        given: --latents-dir, or None.
        record: of `haste prepare`, which may name the folder that it wrote.

    Raises:
        UserError: the folder that is given does not exist or is that of mirror images, or none is given and there are
            others than vae-sd.
    """
    if given is not None and given.endswith(FLIP):
        raise UserError(
            f"--latents-dir must be {given.removesuffix(FLIP)}, beside whose latents --random-flip finds those of the "
            f"mirror images, got {given}"
        )
    name = given if given is not None else check(record.get("latents_dir", LATENTS), str, "latents_dir of the record")
    found = "/" not in name and name not in ("", ".", "..", IMAGES) and root.child(name) is not None
    if found and given is not None:
        return name
    others = folders_of_arrays(root, known={name, name + FLIP})
    if given is not None:
        known = f"which has {' and '.join(others)}" if others else "which has none"
        raise UserError(f"--latents-dir must be a folder of latents beside {IMAGES} in {path}, {known}, got {given!r}")
    if others:
        names = " or ".join([name, *others] if found else others)
        pixels = "" if found else f", or --data-dir {_images_of(root)} to train on pixels"
        raise UserError(
            f"--latents-dir must be {names}, whose latents are to be used{pixels}, got none for {path}, where "
            f"{others[0]} holds .npy files that would not be used"
        )
    return name if found else None


def folders_of_arrays(root: Archive, known: Collection[str] = ()) -> list[str]:
    """The names beside images/, of folders or zips, that hold .npy files, other than `known` ones, which are not read;
    none if there is no images/."""
    if root.child(IMAGES) is None:
        return []
    if isinstance(root, Folder):
        entries = [name for name in os.listdir(root.path) if is_visible(name)]
        names = {name.removesuffix(".zip") for name in entries if name.endswith(".zip") or (root.path / name).is_dir()}
    else:
        names = {name.split("/", 1)[0] for name in root.names() if "/" in name}
    found = sorted(name for name in names.difference(known, [IMAGES]) if _holds_arrays(root.child(name)))
    return [name for name in found if not (name.endswith(FLIP) and name.removesuffix(FLIP) in found)]


def _holds_arrays(archive: Archive | None) -> bool:
    return archive is not None and any(name.endswith(".npy") for name in archive.names())


def _images_of(root: Archive) -> str:
    """What to give for the images alone."""
    if not isinstance(root, Folder):
        return "a zip of the images"
    is_folder = os.path.isdir(root.path / IMAGES)
    return root.locate(IMAGES if is_folder else f"{IMAGES}.zip")


def refuse_passed_over(root: Archive, path: Path, flag: str) -> None:
    """Raise UserError if images/ is to be read alone, and latents are beside it."""
    others = folders_of_arrays(root)
    if others:
        raise UserError(
            f"{flag} must be {_images_of(root)} to read the images alone, or --data-dir {path} with --latents-dir "
            f"{others[0]} to train on latents, got {path}, where {others[0]} holds .npy files that would not be used"
        )


def refuse_among_images(names: list[str], path: Path, flag: str) -> None:
    """Raise UserError if a folder beside those of images holds .npy files only, or if images/ and folders of .npy files
    are one folder further down; `names` are all files."""
    arrays = [name for name in names if name.endswith(".npy") and "/" in name]
    if not arrays:
        return
    images = [name for name in names if is_image(name)]
    below = {name.partition(f"/{IMAGES}/")[0] for name in images if f"/{IMAGES}/" in name}
    for name in arrays:
        parts = name.split("/")
        for depth in range(1, len(parts) - 1):
            folder = "/".join(parts[:depth])
            if folder in below or parts[depth] == LATENTS:
                holds = f"which holds {parts[depth]}, or a zip of its content"
                raise UserError(f"{flag} must be {folder} in {path}, {holds}, got {path}")
    alone = sorted({name.split("/", 1)[0] for name in arrays} - {name.split("/", 1)[0] for name in images})
    if alone and images:
        raise UserError(
            f"{flag} must hold images only, or have them in {IMAGES} beside {alone[0]} to train on its latents with "
            f"--latents-dir {alone[0]}, got {path}, where {alone[0]} holds .npy files that would not be used"
        )
