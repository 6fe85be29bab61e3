"""REPA's layout of images with captions, `coco256_features`, as U-ViT's extraction names its files:

empty_context.npy        here or in the folder above: (tokens, width), the features of the empty caption
N.png                    the image, for a teacher
N.npy                    (2C, S, S): the mean and the logarithm of the variance of its latents
N_0.npy, N_1.npy, ...    (tokens, width), one for each of its captions
captions.json            [[N, [text, ...]], ...], of `haste prepare` alone
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from haste.data.archive import Archive, Folder, open_archive
from haste.data.caption_store import NULL, CaptionStore, read_null, require_finished
from haste.data.dataset import fingerprint
from haste.data.images import decode_image, to_pixels
from haste.data.latents import decode_moments
from haste.data.record import read_record
from haste.data.sources import check_missing
from haste.errors import BadFile, OnBadFile, UserError
from haste.io import parse_json
from haste.validation import shown

SENTENCES = "captions.json"
_NUMBER = r"(0|[1-9]\d{0,8})"
FILE = re.compile(rf"{_NUMBER}(?:_{_NUMBER})?\.npy|{_NUMBER}\.png")
FEATURES = re.compile(rf"{_NUMBER}_{_NUMBER}\.npy")


def are_coco_features(names: list[str]) -> bool:
    """Whether the files of a folder are of this layout."""
    return any(FEATURES.fullmatch(name) for name in names)


def folders_of_coco_features(names: list[str]) -> list[str]:
    """The subfolders that are of this layout, such as train and val."""
    return sorted({name.split("/")[0] for name in names if "/" in name and FEATURES.fullmatch(name.split("/", 1)[1])})


class CocoFeatures(CaptionStore):
    """Images with captions in REPA's layout.

    Args:
        names: the files of the archive.
        path: of the archive.
        flag: that named it, for messages.

    Raises:
        UserError: with "refuse" files that are missing or do not belong to the layout; no features of the empty
            caption; features that are not of the recorded shape.
    """

    def __init__(
        self, archive: Archive, names: list[str], path: Path, flag: str, on_bad_file: OnBadFile = "refuse"
    ) -> None:
        self._archive = archive
        record = read_record(archive)
        require_finished(record, str(path), flag)
        self.record = record
        self.text, self.null = read_null(record, [archive, Folder(path.absolute().parent)], flag)
        self._numbers, self._counts, self.has_images = self._list(names, path, flag, on_bad_file)
        self._sentences = self._read_sentences()

    def _list(
        self, names: list[str], path: Path, flag: str, on_bad_file: OnBadFile
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """The numbers of the images with all their files, the number of captions of each, whether there are PNGs."""
        images, moments, extra = set(), set(), []
        captions: dict[int, set[int]] = {}
        for name in names:
            found = FILE.fullmatch(name)
            if found is None:
                extra += [name] * (name.endswith((".npy", ".png")) and name != NULL)
            elif found[3] is not None:
                images.add(int(found[3]))
            elif found[2] is not None:
                captions.setdefault(int(found[1]), set()).add(int(found[2]))
            else:
                moments.add(int(found[1]))
        everything = sorted(images | moments | captions.keys())
        missing = [f"{number}.npy" for number in everything if number not in moments]
        missing += [f"{number}.png" for number in everything if images and number not in images]
        for number in everything:
            have = captions.get(number, set())
            missing += [f"{number}_{n}.npy" for n in range(max(have, default=0) + 1) if n not in have]
        locate = self._archive.locate
        check_missing(f"{len(missing)} files of {path} are missing", [locate(name) for name in missing], on_bad_file)
        belong = f"{len(extra)} files of {path} are not of the form N.png, N.npy or N_i.npy"
        check_missing(belong, [locate(name) for name in extra], on_bad_file, "remove them")
        incomplete = {int(re.split(r"[_.]", name)[0]) for name in missing}
        whole = [number for number in everything if number not in incomplete]
        if not whole:
            raise UserError(f"{flag} must hold N.npy with N_0.npy, as in coco256_features, got none complete in {path}")
        counts = np.array([len(captions[number]) for number in whole])
        return np.array(whole), counts, bool(images)

    def _read_sentences(self) -> dict[int, list[str]]:
        """The texts of captions.json by number; empty without it."""
        if not self._archive.has(SENTENCES):
            return {}
        where = self._archive.locate(SENTENCES)
        try:
            content = parse_json(self._archive.read(SENTENCES), where, "captions", needs=["captions"])["captions"]
        except BadFile as fault:
            raise UserError(f"{fault}; it must list the captions of the images") from fault
        try:
            sentences = {int(number): [str(text) for text in texts] for number, texts in content}
        except (ValueError, TypeError) as error:
            raise UserError(f"{where} must list [number, [caption, ...]], got {shown(content)}") from error
        fits = all(len(sentences.get(n, [])) == count for n, count in self._pairs())
        if not fits:
            raise UserError(f"{where} must list the captions of each image, as many as N_i.npy, got others")
        return sentences

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._numbers.tolist(), self._counts.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return self._archive.locate(f"{self._numbers[index]}.npy")

    def pixels(self, index: int) -> np.ndarray:
        name = f"{self._numbers[index]}.png"
        return to_pixels(decode_image(self._archive.read(name), self._archive.locate(name)))

    def moments(self, index: int) -> np.ndarray:
        return self._read(f"{self._numbers[index]}.npy")

    def count(self, index: int) -> int:
        return int(self._counts[index])

    def features(self, index: int, choice: int) -> np.ndarray:
        name = f"{self._numbers[index]}_{choice}.npy"
        features = self._read(name)
        if features.shape != self.text.shape:
            found = " x ".join(map(str, features.shape))
            wanted = f"{self.text.tokens} x {self.text.width} numbers, as {NULL}"
            raise BadFile(self._archive.locate(name), f"must hold {wanted}, got {found}")
        return features

    def sentence(self, index: int, choice: int) -> str | None:
        texts = self._sentences.get(int(self._numbers[index]))
        return None if texts is None else texts[choice]

    def fingerprint(self) -> dict[str, Any]:
        def read(index: int) -> bytes:
            number = self._numbers[index]
            return b"".join(self._archive.read(name) for name in (f"{number}.npy", f"{number}_0.npy"))

        names = np.stack([self._numbers, self._counts]).astype(np.int64).tobytes()
        return fingerprint(len(self), names, None, read)

    def _read(self, name: str) -> np.ndarray:
        return decode_moments(self._archive.read(name), self._archive.locate(name))


def encode_sentences(captions: list[tuple[int, list[str]]]) -> bytes:
    """The content of captions.json."""
    return json.dumps({"captions": captions}, ensure_ascii=False).encode("utf-8", "replace")


def open_coco_features(path: Path, flag: str, on_bad_file: OnBadFile = "refuse") -> CocoFeatures:
    """Open a folder or a zip of this layout. Raises UserError as `CocoFeatures`."""
    archive = open_archive(path, flag)
    return CocoFeatures(archive, archive.names(), path, flag, on_bad_file)
