"""Images with labels in webdataset's tars,

    00000.tar    KEY.jpg, .png or .webp, and KEY.cls with a number, or KEY.json with a "label"

as a source of which any image is read by itself. Finding the members reads the header of each, which takes minutes for
a data set of ImageNet's size; so the index is kept in the user's cache folder, for as long as no tar changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from haste.data.archive import read_npz, write_arrays
from haste.data.images import is_image
from haste.data.sources import FileSource, check_missing
from haste.data.tars import Tars, first_dot, open_tars
from haste.errors import BadFile, OnBadFile, UserError, in_one_line
from haste.io import MOST_CLASSES
from haste.validation import shown

logger = logging.getLogger(__name__)

FORM = 2  # of the index
KEYS = ("label", "cls", "class_id")  # of a label in JSON, the first that is there


def open_labelled_tars(paths: list[Path], flag: str, on_bad_file: OnBadFile = "refuse") -> FileSource:
    """Open the images of tars, in the order of their names; without labels if no image has one.

    Raises:
        UserError: there are none, or with "refuse" damaged tars, or images or labels that are missing or invalid.
    """
    index = _index_path(paths)
    source = _read_index(index, paths)
    if source is not None:
        return source
    tars = open_tars(paths, flag, on_bad_file)
    images, written = _members(tars, flag)
    labels: np.ndarray | None = None
    whole = not tars.damaged
    if written:
        found, lone = _labels(tars, images, written, on_bad_file)
        whole = whole and not lone
        names = list(found)
        labels = np.array(list(found.values()), dtype=np.int64)
    else:
        names = sorted(images.values())
    if not names:
        raise UserError(f"{flag} must hold tars of images with labels, got none in {paths[0]}")
    tars = tars.only(names)
    if whole:
        _write_index(index, tars, labels)
    return FileSource(tars, names, labels)


def _members(tars: Tars, flag: str) -> tuple[dict[str, str], dict[str, str]]:
    """The images and the files of labels, by key. Raises UserError."""
    images: dict[str, str] = {}
    kinds: dict[str, dict[str, str]] = {".cls": {}, ".json": {}, ".txt": {}}
    for name in tars.names():
        key, suffix = first_dot(name)
        suffix = suffix.lower()  # as webdataset
        if suffix in kinds:
            kinds[suffix][key] = name
        elif suffix.count(".") == 1 and is_image(f"x{suffix}"):
            if key in images:
                raise UserError(f"{flag} must have one image of each key, got {images[key]} and {name}")
            images[key] = name
    if not images:
        raise UserError(f"{flag} must hold tars of images, got none in {tars.paths[0]}")
    if kinds[".txt"] and not (kinds[".cls"] or kinds[".json"]):
        raise UserError(
            f"{flag} must have a .cls with its class beside each image, got {tars.paths[0]} with .txt alone; haste "
            "prepare --captions reads captions"
        )
    return images, {**kinds[".json"], **kinds[".cls"]}


def _labels(
    tars: Tars, images: dict[str, str], written: dict[str, str], on_bad_file: OnBadFile
) -> tuple[dict[str, int], list[str]]:
    """The labels by the names of images, sorted, and what has no counterpart or is invalid. Raises UserError."""
    lone = [tars.locate(name) for key, name in images.items() if key not in written]
    lone += [tars.locate(name) for key, name in written.items() if key not in images and name.lower().endswith(".cls")]
    check_missing(f"{len(lone)} images or labels have no counterpart", lone, on_bad_file)
    found = {}
    for key, name in sorted(images.items(), key=lambda item: item[1]):
        try:
            if key in written:
                found[name] = read_label(tars, written[key])
        except BadFile as fault:
            if on_bad_file == "refuse":
                raise fault.as_user_error() from fault
            logger.warning("skipped: %s", fault)
            lone.append(fault.name)
    return found, lone


def read_label(tars: Tars, name: str) -> int:
    """The class in a .cls or .json file. Raises BadFile."""
    data, where = tars.read(name), tars.locate(name)
    of_json = name.lower().endswith(".json")
    try:
        label = json.loads(data) if of_json else int(data)  # webdataset reads .cls alike, 007 too
    except (ValueError, RecursionError) as error:
        raise BadFile(where, f"must hold the number of a class ({in_one_line(error)})") from error
    if of_json:
        if not isinstance(label, dict) or not any(key in label for key in KEYS):
            raise BadFile(where, f'must be JSON with a "{KEYS[0]}", got {shown(label)}')
        label = next(label[key] for key in KEYS if key in label)
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        raise BadFile(where, f"must hold a class from 0 to {MOST_CLASSES - 1:,}, got {shown(label)}")
    return label


# ---- the index ----


def _index_path(paths: Iterable[Path]) -> Path:
    """Where the index of these tars is kept, by their places, sizes and times of change."""
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = hashlib.sha256(repr((FORM, stamps)).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "haste" / "tars" / f"{name}.npz"


def _read_index(path: Path, paths: list[Path]) -> FileSource | None:
    """The source of an index; None if there is none that can be used."""
    if not path.is_file():
        return None
    try:
        arrays = read_npz(path, ("names", "places", "labels"))
        names, places, labels = arrays["names"], arrays["places"], arrays.get("labels")
        valid = names.dtype.kind == "S" and places.shape == (len(names), 3) and places.dtype == np.int64
        if not valid or not len(names) or places.min() < 0 or places[:, 0].max() >= len(paths):
            return None
        if labels is not None and (labels.shape != names.shape or labels.dtype != np.int64 or labels.min() < 0):
            return None
    except (BadFile, KeyError, ValueError):
        return None
    tars = Tars(paths, names, places)
    return FileSource(tars, tars.names(), labels)


def _write_index(path: Path, tars: Tars, labels: np.ndarray | None) -> None:
    arrays = {"names": tars.index[0], "places": tars.index[1], **({} if labels is None else {"labels": labels})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, arrays)
    except OSError as error:
        logger.info("the index of the tars is not kept: %s cannot be written (%s)", path, error.strerror)
