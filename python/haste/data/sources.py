"""Images by number, as bytes with labels: of a folder or a zip of files, or of a Hugging Face data set on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from haste.data.archive import Archive, Folder, open_archive
from haste.data.images import IMAGE_FORMATS, image_format, is_image
from haste.errors import BadFile, UserError, in_one_line, require
from haste.io import MOST_CLASSES, parse_json, read_json
from haste.validation import check

logger = logging.getLogger(__name__)

LABEL_FILE = "dataset.json"
LATENTS = "vae-sd"  # of REPA's layout, beside images/
LABEL_FORM = '{"labels": [[name, label], ...]}'
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class ImageSource(Protocol):
    """Images by number.

    Attributes:
        labels: (count,), int64, or None where there are none.
        num_classes: 1 without labels.
        class_names: by label, or None where classes have none.
    """

    labels: np.ndarray | None
    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call an image."""

    def read(self, index: int) -> bytes:
        """The bytes of an image's file; BadFile if there are none."""

    def listing(self) -> bytes:
        """Bytes that are the same for the same names of images in the same order."""

    def digest(self) -> str:
        """A checksum of which images these are, in which order, with which labels."""


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
        # One block of bytes: a list of a million strings would be copied into every worker process, page by page, as
        # Python counts the references to them.
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


def open_source(path: Path, flag: str) -> ImageSource:
    """Open the images at `path`, which `flag` gave; UserError if there are none, or their classes are not clear."""
    if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
        return HuggingFaceSource(path, flag)
    archive = open_archive(path, flag)
    inner = archive.child("images")
    if inner is not None and not any(is_image(name) for name in archive.names() if not name.startswith("images/")):
        archive = inner  # the images of REPA's layout
    return open_files(archive, f"{flag} is {path}, which")


def open_files(archive: Archive, what: str) -> FileSource:
    """Open every image file of an archive; their labels are those of dataset.json, or else the folders at the top.

    Args:
        what: begins the messages.

    Raises:
        UserError: there are none, their classes are not clear, or it is REPA's layout one folder further down.
    """
    everything = archive.names()
    _check_no_layout_below(everything, what)
    names = [name for name in everything if is_image(name)]
    if not names:
        kinds = ", ".join(IMAGE_FORMATS)
        raise UserError(f"{what} holds no images; it must hold files of {kinds}, or a folder of them for each class")
    others = [name for name in everything if image_format(name) not in (None, *IMAGE_FORMATS)]
    if others:
        logger.warning("skipped %d files of formats that are not read, such as %s", len(others), others[0])
    if archive.has(LABEL_FILE):
        return FileSource(archive, names, choose_labels(listed_labels(archive), names, archive.locate(LABEL_FILE)))
    return FileSource(archive, names, *_labels_of_folders(names, what))


def _check_no_layout_below(names: list[str], what: str) -> None:
    """Refuse a folder that holds REPA's layout, or a zip with that folder in it: its latents would not be read."""
    below = next((name for name in names if name.endswith(".npy") and f"/{LATENTS}/" in name), None)
    if below is not None:
        folder = below.partition(f"/{LATENTS}/")[0]
        raise UserError(f"{what} holds {LATENTS} inside {folder}; it must be that folder, or a zip of what is in it")


def _labels_of_folders(names: list[str], what: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels, and the classes: the folders at the top, sorted. None where all images lie at the top, as one class."""
    tops = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if classes == [""]:
        return None, None
    if classes[0] == "":
        raise UserError(f"{what} holds images beside its class folders, such as {names[tops.index('')]}")
    if {name.lower() for name in classes} <= SPLITS:
        raise UserError(f"{what} holds {' and '.join(classes)}, not classes; it must be one of these folders")
    if len(classes) == 1 and len({name.rpartition("/")[0] for name in names}) > 1:
        logger.warning(
            "%s holds all its images in %s, as one class; if the folders in it are classes, it must be that folder, "
            "or a zip of what is in it", what, classes[0],
        )  # fmt: skip
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[top] for top in tops], dtype=np.int64), classes


def listed_labels(archive: Archive) -> dict[str, Any] | None:
    """The labels of dataset.json by name; None where they are null."""
    where = archive.locate(LABEL_FILE)
    try:
        data = archive.read(LABEL_FILE)
    except BadFile as error:
        raise UserError(f"{error}; it must list the labels of the files beside it") from error
    labels = parse_json(data, where, LABEL_FORM, needs=["labels"])["labels"]
    if labels is None:
        return None
    if not isinstance(labels, list):
        raise UserError(f"{where} must be {LABEL_FORM}, and its labels are {type(labels).__name__}")
    for pair in labels:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where} must be {LABEL_FORM}, and {str(pair)[:60]} is no pair of a name and a label")
    return {name.replace("\\", "/"): label for name, label in labels}


def choose_labels(listed: dict[str, Any] | None, names: list[str], where: str) -> np.ndarray | None:
    """The labels of these files; UserError where one has none, or one that is no class. where: of dataset.json."""
    if listed is None:
        return None
    missing = [name for name in names if name not in listed]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{where} has no label for {missing[0]}{others}")
    labels = [listed[name] for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            limit = f"counted from 0, below {MOST_CLASSES:,}"
            raise UserError(f"{where} gives {name} the label {str(label)[:60]}; it must be a class, {limit}")
    return np.array(labels, dtype=np.int64)


class HuggingFaceSource:
    """A data set that `save_to_disk` of the package datasets has written; of several splits, the one named train."""

    def __init__(self, path: Path, flag: str) -> None:
        dataset = _load_from_disk(path, flag)
        kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        if len(images) != 1:
            columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise UserError(f"{flag} is {path}, whose columns are {columns}; it must have exactly one column of images")
        self.path = path
        self._column = images[0]
        self.labels, self.num_classes, self.class_names = _labels_of_column(dataset, kinds, f"{flag} is {path}, whose")
        import datasets

        try:
            undecoded = dataset.select_columns(images).cast_column(self._column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's own errors among them
            raise UserError(f"{flag} is {path}, whose images cannot be read: {in_one_line(error)}") from error
        self._rows = undecoded.with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def read(self, index: int) -> bytes:
        try:
            image = self._rows[index][self._column] or {}
        except Exception as error:  # as above
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


def _load_from_disk(path: Path, flag: str) -> Any:
    datasets = require("datasets")
    _check_files(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's own errors among them
        raise UserError(f"{flag} is {path}, which cannot be loaded by datasets: {in_one_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{flag} is {path}, whose splits are {', '.join(dataset)}; it must be one of these folders")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise UserError(f"{flag} is {path}, which holds no images")
    return dataset


def _check_files(path: Path) -> None:
    """Refuse records of a data set that are none, and tables that are not files beside them, such as pipes."""
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
                raise UserError(f"{folder / 'state.json'} lists {str(name)[:60]}, which is no file beside it")


def _labels_of_column(
    dataset: Any, kinds: dict[str, str], what: str
) -> tuple[np.ndarray | None, int, list[str] | None]:
    """The one ClassLabel column, or the column named label; the number of classes and their names."""
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    column = classes[0] if len(classes) == 1 else "label"
    if column not in kinds:
        if classes:
            raise UserError(f"{what} columns {' and '.join(classes)} are both classes; one must be named label")
        return None, 1, None
    try:
        labels = np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])
    except Exception as error:  # pyarrow's own errors among them
        raise UserError(f"{what} column {column} cannot be read: {in_one_line(error)}") from error
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise UserError(f"{what} column {column} holds other values than classes, counted from 0")
    feature = dataset.features[column]
    num_classes = getattr(feature, "num_classes", None) or int(labels.max()) + 1
    return labels.astype(np.int64), num_classes, getattr(feature, "names", None)
