"""Sources of images with labels: a folder or a zip of files, a Hugging Face data set on disk, or tars."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from haste.data.archive import Archive, Folder, open_archive
from haste.data.images import IMAGE_FORMATS, image_format, is_image
from haste.data.latent_folders import IMAGES, refuse_among_images, refuse_passed_over
from haste.data.tars import find_tars
from haste.errors import BadFile, OnBadFile, UserError, in_one_line, require
from haste.io import MOST_CLASSES, parse_json, read_json
from haste.validation import check, shown

logger = logging.getLogger(__name__)

LABEL_FILE = "dataset.json"
LABEL_FORM = '{"labels": [[name, label], ...]}'
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class ImageSource(Protocol):
    """Encoded images by number.

    Attributes:
        labels: (count,), int64, or None without labels.
        num_classes: 1 without labels.
        class_names: by label, or None without names.
    """

    labels: np.ndarray | None
    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image, for messages."""

    def read(self, index: int) -> bytes:
        """The bytes of an image's file. Raises BadFile if it cannot be read."""

    def listing(self) -> bytes:
        """Bytes that identify the names of the images, in order."""

    def digest(self) -> str:
        """A checksum of the names and labels, in order."""


class FileSource:
    """Named files of a folder or a zip."""

    def __init__(
        self,
        archive: Archive,
        names: list[str],
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.archive = archive
        # One array: reference counting would copy a list of a million strings into every worker process.
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = labels
        self.num_classes = 1 if labels is None else int(labels.max()) + 1
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self.archive.locate(os.fsdecode(self._names[index]))

    def read(self, index: int) -> bytes:
        return self.archive.read(os.fsdecode(self._names[index]))

    def listing(self) -> bytes:
        return b"\n".join(self._names.tolist())

    def digest(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(self.listing() + labels).hexdigest()


def open_source(path: Path, flag: str, on_bad_file: OnBadFile = "refuse") -> ImageSource:
    """Open the images at `path`.

    Raises:
        UserError: there are none, their classes are unclear, or with "refuse" listed ones are missing; names `flag`.
    """
    if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
        return HuggingFaceSource(path, flag)
    tars = find_tars(path)
    if tars and (os.path.isfile(path) or not any(map(is_image, Folder(path).names()))):
        from haste.data.labelled_tars import open_labelled_tars  # which builds on this file

        return open_labelled_tars(tars, flag, on_bad_file)
    if tars:
        logger.warning("the images in %s are read, and not its %d tars", path, len(tars))
    archive = open_archive(path, flag)
    inner = archive.child(IMAGES)
    if inner is not None and not any(is_image(name) for name in archive.names() if not name.startswith(f"{IMAGES}/")):
        refuse_passed_over(archive, path, flag)
        archive = inner  # the images of REPA's layout
    return open_files(archive, path, flag, on_bad_file)


def open_files(archive: Archive, path: Path, flag: str, on_bad_file: OnBadFile = "refuse") -> FileSource:
    """Open all image files of an archive. Their labels are from dataset.json, or else from the top folders."""
    everything = archive.names()
    refuse_among_images(everything, path, flag)
    names = [name for name in everything if is_image(name)]
    if not names:
        kinds = ", ".join(IMAGE_FORMATS)
        raise UserError(f"{flag} must hold images ({kinds}), or a folder of them for each class, got none in {path}")
    others = [name for name in everything if image_format(name) not in (None, *IMAGE_FORMATS)]
    if others:
        logger.warning("skipped %d files of other formats, such as %s", len(others), others[0])
    if archive.has(LABEL_FILE):
        listed, where = listed_labels(archive), archive.locate(LABEL_FILE)
        missing = [archive.locate(name) for name in (listed or {}).keys() - set(everything)]
        check_missing(f"{len(missing)} of the files that {where} lists are missing", missing, on_bad_file)
        return FileSource(archive, names, choose_labels(listed, names, where))
    return FileSource(archive, names, *labels_of_folders(names, path, flag))


def check_missing(what: str, files: list[str], on_bad_file: OnBadFile, way_out: str = "restore them") -> None:
    """Refuse, or log, files that are missing or too many, if there are any; `what` begins the message."""
    if not files:
        return
    what = f"{what}, the first being {min(files)}"
    if on_bad_file == "refuse":
        raise UserError(f"{what}; {way_out}, or skip such files with --on-bad-file skip")
    logger.warning("skipped: %s", what)


def labels_of_folders(names: list[str], path: Path, flag: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels, and the names of the classes: the top folders, sorted. None if there are no folders."""
    tops = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if classes == [""]:
        return None, None
    if classes[0] == "":
        lone = names[tops.index("")]
        raise UserError(
            f"{flag} must hold images in class folders or without folders, got both in {path}, such as {lone}"
        )
    if {name.lower() for name in classes} <= SPLITS:
        raise UserError(f"{flag} must be one of the folders {' and '.join(classes)} in {path}, which are no classes")
    if len(classes) == 1 and len({name.rpartition("/")[0] for name in names}) > 1:
        logger.warning(
            "%s %s has one class, %s; if the folders in it are the classes, give that folder, or a zip of its content",
            flag, path, classes[0],
        )  # fmt: skip
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[top] for top in tops], dtype=np.int64), classes


def listed_labels(archive: Archive) -> dict[str, Any] | None:
    """The labels of dataset.json by name; None if they are null."""
    where = archive.locate(LABEL_FILE)
    try:
        data = archive.read(LABEL_FILE)
    except BadFile as error:
        raise UserError(f"{error}; it must list the labels of the files") from error
    labels = parse_json(data, where, LABEL_FORM, needs=["labels"])["labels"]
    if labels is None:
        return None
    if not isinstance(labels, list):
        raise UserError(f"{where} must be {LABEL_FORM}, got labels of type {type(labels).__name__}")
    for pair in labels:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where} must be {LABEL_FORM}, got {shown(pair)} for a pair")
    return {name.replace("\\", "/"): label for name, label in labels}


def choose_labels(listed: dict[str, Any] | None, names: list[str], where: str) -> np.ndarray | None:
    """The labels of files, from those listed in dataset.json at `where`. Raises UserError for an invalid label."""
    if listed is None:
        return None
    missing = [name for name in names if name not in listed]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{where} must have a label for each file, got none for {missing[0]}{others}")
    labels = [listed[name] for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise UserError(f"{where} must have labels from 0 to {MOST_CLASSES - 1:,}, got {shown(label)} for {name}")
    return np.array(labels, dtype=np.int64)


class HuggingFaceSource:
    """A data set written by `save_to_disk` of the package datasets; of several splits, the one named train.

    Args:
        labelled: whether it needs readable labels if it has any.
    """

    def __init__(self, path: Path, flag: str, labelled: bool = True) -> None:
        dataset = _load_from_disk(path, flag)
        kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        if len(images) != 1:
            columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise UserError(f"{flag} must have one column of images, got {columns} in {path}")
        self.path = path
        self._column = images[0]
        self.labels, self.num_classes, self.class_names = None, 1, None
        if labelled:
            self.labels, self.num_classes, self.class_names = _labels_of_column(dataset, kinds, path, flag)
        self._dataset = dataset
        import datasets

        try:
            undecoded = dataset.select_columns(images).cast_column(self._column, datasets.Image(decode=False))
        except Exception as error:  # of pyarrow, among others
            raise UserError(f"{flag} must have readable images, got {path}: {in_one_line(error)}") from error
        self._rows = undecoded.with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def read(self, index: int) -> bytes:
        try:
            image = self._rows[index][self._column] or {}
        except Exception as error:  # of pyarrow, among others
            raise BadFile(self.name(index), f"cannot be read ({in_one_line(error)})") from error
        if image.get("bytes") is not None:
            return image["bytes"]
        if image.get("path") is None:
            raise BadFile(self.name(index), "is missing")
        file = Path(image["path"])
        return Folder(file.parent).read(file.name)

    def listing(self) -> bytes:
        return self._rows._fingerprint.encode()

    def digest(self) -> str:
        return self._rows._fingerprint

    def columns(self, holds: Callable[[Any], bool]) -> list[str]:
        """The names of the columns whose feature is of a kind."""
        return [name for name, feature in self._dataset.features.items() if holds(feature)]

    def select(self, column: str) -> Any:
        """One column as rows, without the others."""
        return self._dataset.select_columns([column]).with_format(None)


def _load_from_disk(path: Path, flag: str) -> Any:
    datasets = require("datasets")
    _check_files(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # of pyarrow, among others
        raise UserError(f"{flag} must be loadable by datasets, got {path}: {in_one_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{flag} must be one of the splits {', '.join(dataset)} in {path}, got all")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise UserError(f"{flag} must hold images, got none in {path}")
    return dataset


def _check_files(path: Path) -> None:
    """Refuse invalid records of a data set, and tables that are no regular files in the same folder."""
    record, folders = path / "dataset_dict.json", [path]
    if record.is_file():
        splits = read_json(record, "the record of a Hugging Face data set", needs=["splits"])["splits"]
        folders = [path / name for name in check(splits, list[str], f"splits of {record}")]
    for folder in folders:
        state = read_json(folder / "state.json", "the state of a Hugging Face data set", needs=["_data_files"])
        tables = check(state["_data_files"], list[dict[str, Any]], f"_data_files of {folder / 'state.json'}")
        for table in tables:
            name = table.get("filename")
            if not isinstance(name, str) or "/" in name or not os.path.isfile(folder / name):
                raise UserError(f"{folder / 'state.json'} must list files in its folder, got {shown(name)}")


def _labels_of_column(
    dataset: Any, kinds: dict[str, str], path: Path, flag: str
) -> tuple[np.ndarray | None, int, list[str] | None]:
    """The only ClassLabel column, or the column named label; the number of classes and their names."""
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    column = classes[0] if len(classes) == 1 else "label"
    if column not in kinds:
        if classes:
            raise UserError(f"{flag} must have one column of classes, or one named label, got {classes} in {path}")
        return None, 1, None
    try:
        labels = np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])
    except Exception as error:  # of pyarrow, among others
        raise UserError(f"{flag} must have a readable column {column}, got {path}: {in_one_line(error)}") from error
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise UserError(f"{flag} must have labels from 0 to {MOST_CLASSES - 1:,} in {column}, got others in {path}")
    feature = dataset.features[column]
    num_classes = getattr(feature, "num_classes", None) or int(labels.max()) + 1
    return labels.astype(np.int64), num_classes, getattr(feature, "names", None)
