"""Sources of images with captions, in any of four forms:

images/, annotations/captions_*.json     MS-COCO's own layout
NAME.jpg, NAME.txt                       pairs, one caption a line, in a folder or a zip
00000.tar, 00001.tar, ...                webdataset's tars of such pairs; NAME.json with a "caption" also serves
state.json, *.arrow                      a Hugging Face data set on disk, with a column of images and one of captions
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from haste.data.archive import Archive, open_archive
from haste.data.images import is_image
from haste.data.sources import FileSource, HuggingFaceSource, ImageSource, check_missing
from haste.data.tars import Tars, find_tars, first_dot, open_tars
from haste.errors import BadFile, OnBadFile, UserError, in_one_line
from haste.io import in_bytes, read_json
from haste.text import in_utf8
from haste.validation import shown

logger = logging.getLogger(__name__)

COLUMNS = ("captions", "caption", "texts", "text", "sentences", "prompt")  # of captions, the first that is there
LARGEST_CAPTIONS = 2**20  # bytes of the captions of one image
COCO_FORM = '{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'


class CaptionSource(Protocol):
    """Images with captions, by number.

    Attributes:
        origin: where the captions are from, for the record.
    """

    origin: str

    @property
    def images(self) -> ImageSource: ...

    def captions(self, index: int) -> list[str]:
        """The captions of an image, at least one. Raises BadFile if they cannot be read."""

    def digest(self) -> str:
        """A checksum of the names, and of the captions where they are all in memory."""


def open_captioned(
    captions: Path, images: Path | None = None, flag: str = "--captions", on_bad_file: OnBadFile = "refuse"
) -> CaptionSource:
    """Open images with captions.

    Args:
        captions: COCO's annotations or the folder above them; a folder or zip of pairs; a tar or a folder of tars; or a
            Hugging Face data set.
        images: the folder or zip of the images, if they are not found beside the captions.
        flag: that named `captions`, for messages.

    Raises:
        UserError: there are none, or with "refuse" captions and images that do not match.
    """
    if not os.path.exists(captions):
        raise UserError(f"{flag} must be captions that exist, got {captions}")
    if any(os.path.isfile(captions / name) for name in ("dataset_dict.json", "state.json")):
        _refuse_images(images, flag, "a Hugging Face data set, which has its images")
        return ColumnCaptions(captions, flag)
    tars = find_tars(captions)
    if tars:
        _refuse_images(images, flag, "tars, which have their images")
        return pair_captions(open_tars(tars, flag, on_bad_file), None, captions, flag, on_bad_file, first_dot)
    annotations = _find_annotations(captions, flag)
    if annotations is not None:
        return open_coco(annotations, images, flag, on_bad_file)
    archive = open_archive(captions, flag)
    other = None if images is None else open_archive(images, "--source")
    return pair_captions(archive, other, captions, flag, on_bad_file, last_dot)


def _refuse_images(images: Path | None, flag: str, what: str) -> None:
    if images is not None:
        raise UserError(f"--source must be left out with {flag} of {what}, got {images}")


def decode_captions(data: bytes, name: str) -> list[str]:
    """The lines of a text file that are not blank. Raises BadFile for none, for too many bytes and for no UTF-8."""
    if len(data) > LARGEST_CAPTIONS:
        raise BadFile(name, f"has {in_bytes(len(data))}; at most {in_bytes(LARGEST_CAPTIONS)} of captions are read")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadFile(name, f"must be UTF-8 text ({in_one_line(error)})") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise BadFile(name, "must hold a caption, got none")
    return captions


# ---- pairs of files, in a folder, a zip or tars ----


def last_dot(name: str) -> tuple[str, str]:
    """The name of a file without its suffix, and the suffix with its dot."""
    return os.path.splitext(name)


class FileCaptions:
    """One file of captions for each image: text, or JSON with a caption."""

    def __init__(self, images: FileSource, texts: FileSource, origin: str) -> None:
        self.images, self._texts, self.origin = images, texts, origin

    def captions(self, index: int) -> list[str]:
        name, data = self._texts.name(index), self._texts.read(index)
        return _captions_of_json(data, name) if name.endswith(".json") else decode_captions(data, name)

    def digest(self) -> str:
        return hashlib.sha256(self.images.listing() + b"\n\n" + self._texts.listing()).hexdigest()


def _captions_of_json(data: bytes, name: str) -> list[str]:
    """The text under "caption", or the list of texts."""
    try:
        content = json.loads(data)
        found = content["caption"] if "caption" in content else content["captions"]
        lines = [found] if isinstance(found, str) else [str(line) for line in found]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(name, f'must be JSON with a "caption" ({in_one_line(error)})') from error
    return decode_captions(in_utf8("\n".join(" ".join(line.split()) for line in lines)).encode(), name)


def pair_captions(
    texts: Archive,
    images: Archive | None,
    path: Path,
    flag: str,
    on_bad_file: OnBadFile,
    cut: Callable[[str], tuple[str, str]],
) -> FileCaptions:
    """Images and the files of captions of the same name but for its suffix; `images` None: in the same archive."""
    pictures = texts if images is None else images
    everything = texts.names()
    written: dict[str, dict[str, str]] = defaultdict(dict)
    for name in everything:
        stem, suffix = cut(name)
        if suffix in (".txt", ".json"):
            written[stem][suffix] = name
    pictured: dict[str, str] = {}
    for name in everything if images is None else images.names():
        stem, suffix = cut(name)
        if suffix.count(".") == 1 and is_image(f"x{suffix}"):
            if stem in pictured:
                raise UserError(f"{flag} must have one image for a caption, got {pictured[stem]} and {name}")
            pictured[stem] = name
    # A .json by itself may be anything, such as the counts of img2dataset.
    chosen = {
        stem: kinds.get(".txt") or kinds[".json"]
        for stem, kinds in written.items()
        if ".txt" in kinds or stem in pictured
    }
    both = [stem for stem in pictured if stem in chosen]
    if not both:
        where = "beside it" if images is None else "of its name in --source"
        raise UserError(
            f"{flag} must be COCO's annotations, a folder or zip of images with a .txt for each, tars of such pairs, "
            f"or a Hugging Face data set, got {path}, where no .txt has an image {where}"
        )
    lone = [pictures.locate(name) for stem, name in pictured.items() if stem not in chosen]
    lone += [texts.locate(name) for stem, name in chosen.items() if stem not in pictured]
    check_missing(f"{len(lone)} images or captions have no counterpart", lone, on_bad_file)
    image_files = FileSource(pictures, [pictured[stem] for stem in both])
    kind = "tars" if isinstance(texts, Tars) else "pairs"
    return FileCaptions(image_files, FileSource(texts, [chosen[stem] for stem in both]), f"{kind} {path.resolve()}")


# ---- MS-COCO ----


class ListedCaptions:
    """Captions in memory."""

    def __init__(self, images: ImageSource, captions: list[list[str]], origin: str) -> None:
        self.images, self._captions, self.origin = images, captions, origin

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def digest(self) -> str:
        return hashlib.sha256(self.images.listing() + json.dumps(self._captions).encode()).hexdigest()


def _find_annotations(path: Path, flag: str) -> Path | None:
    """COCO's file of captions: the path itself, or the only one in its folder; None if there is none."""
    if os.path.isfile(path):
        return path if path.suffix == ".json" else None
    named = [*path.glob("annotations/captions*.json"), *path.glob("captions*.json"), *path.glob("annotations*.json")]
    found = sorted(named or path.glob("annotations/*.json"))
    if len(found) > 1:
        raise UserError(f"{flag} must be one of {', '.join(file.name for file in found)} in {path}, got all")
    return found[0] if found else None


def open_coco(annotations: Path, images: Path | None, flag: str, on_bad_file: OnBadFile) -> ListedCaptions:
    """MS-COCO's captions, ordered by the number of the image, as in its public features.

    Args:
        annotations: such as annotations/captions_train2014.json.
        images: None for those beside it: train2014/, images/train2014/ or images/.

    Raises:
        UserError: a file of another kind, or with "refuse" images or captions without a counterpart.
    """
    files, captions = _read_coco(annotations)
    folder = images if images is not None else _images_beside(annotations, flag)
    archive = open_archive(folder, flag if images is None else "--source")
    present = [name for name in archive.names() if is_image(name)]
    by_id = _match(dict(sorted(files.items())), present, annotations)
    chosen = [number for number, name in by_id.items() if name is not None and number in captions]
    if not chosen:
        raise UserError(
            f"{flag} must be the captions of the images in {folder}, got {annotations}, which lists none of them"
        )
    lone = [archive.locate(files[number]) for number, name in by_id.items() if name is None]
    check_missing(f"{len(lone)} of the images that {annotations} lists are missing", lone, on_bad_file)
    silent = [archive.locate(name) for number, name in by_id.items() if name is not None and number not in captions]
    silent += [f"the caption of image {number}" for number in captions if number not in files]
    check_missing(f"{len(silent)} images or captions have no counterpart in {annotations}", silent, on_bad_file)
    extra = len(set(present).difference(filter(None, by_id.values())))
    if extra:
        logger.info("%d images in %s are not listed in %s and are left out", extra, folder, annotations.name)
    source = FileSource(archive, [by_id[number] or "" for number in chosen])
    return ListedCaptions(source, [captions[number] for number in chosen], f"COCO {annotations.resolve()}")


def _match(files: dict[int, str], present: list[str], annotations: Path) -> dict[int, str | None]:
    """The image of each listed name, by number: of that path, or else of the same name in another folder, if there is
    one and no other listed file has that name; None if there is none.

    Raises:
        UserError: several could be meant.
    """
    paths, places = set(present), defaultdict(list)
    for name in present:
        places[os.path.basename(name)].append(name)
    listed = Counter(map(os.path.basename, files.values()))
    found: dict[int, str | None] = {}
    for number, name in files.items():
        base = os.path.basename(name)
        if name in paths:
            found[number] = name
        elif listed[base] > 1 or not places[base]:
            found[number] = None
        elif len(places[base]) > 1:
            raise UserError(f"{annotations} must list images by their paths where names are not unique, got {name}, "
                            f"which is {places[base][0]} or {places[base][1]}")  # fmt: skip
        else:
            found[number] = places[base][0]
    return found


def _read_coco(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The names of the images' files and the captions, by the images' numbers."""
    content = read_json(path, COCO_FORM, needs=["images", "annotations"])
    files: dict[int, str] = {}
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in _entries(content, "images", path):
        number, name = entry.get("id"), entry.get("file_name")
        if type(number) is not int or not isinstance(name, str) or number in files:
            raise UserError(f"{path} must be {COCO_FORM}, with different ids, got {shown(entry)}")
        files[number] = name
    for entry in _entries(content, "annotations", path):
        number, caption = entry.get("image_id"), entry.get("caption")
        if type(number) is not int or not isinstance(caption, str):
            raise UserError(f"{path} must be {COCO_FORM}, got {shown(entry)}")
        if caption.strip():
            captions[number].append(in_utf8(" ".join(caption.split())))
    return files, dict(captions)


def _entries(content: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    entries = content[name]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{name} of {path} must be a list, as in {COCO_FORM}, got {shown(entries)}")
    return entries


def _images_beside(annotations: Path, flag: str) -> Path:
    """The folder or zip of the images of annotations/captions_SPLIT.json: SPLIT, images/SPLIT or images."""
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    split = annotations.stem.removeprefix("captions_")
    places = [root / split, root / "images" / split, root / "images"]
    for place in [*places, *(place.with_name(f"{place.name}.zip") for place in places)]:
        if os.path.exists(place):
            return place
    raise UserError(
        f"{flag} must lie beside its images, in {' or '.join(map(str, places))}, or come with --source, got "
        f"{annotations}"
    )


# ---- a Hugging Face data set ----


class ColumnCaptions:
    """A column of text, or of lists of texts, beside the column of images."""

    def __init__(self, path: Path, flag: str) -> None:
        self.images = HuggingFaceSource(path, flag, labelled=False)
        texts = self.images.columns(_is_text)
        named = [column for column in COLUMNS if column in texts]
        if not named and len(texts) != 1:
            raise UserError(
                f"{flag} must have a column of text named {' or '.join(COLUMNS)}, got {', '.join(texts) or 'none'} in "
                f"{path}"
            )
        self._column = (named or texts)[0]
        self._rows = self.images.select(self._column)
        self.origin = f"Hugging Face {path.resolve()}, column {self._column}"

    def captions(self, index: int) -> list[str]:
        name = f"the {self._column} of {self.images.name(index)}"
        try:
            found = self._rows[index][self._column]
        except Exception as error:  # of pyarrow, among others
            raise BadFile(name, f"cannot be read ({in_one_line(error)})") from error
        lines = [found] if isinstance(found, str) else [line for line in found or [] if isinstance(line, str)]
        captions = [in_utf8(" ".join(line.split())) for line in lines if line.strip()]
        if not captions:
            raise BadFile(name, "must hold a caption, got none")
        return captions

    def digest(self) -> str:
        return self.images.digest()


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts, or lists of them."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")
