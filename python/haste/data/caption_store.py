"""What stored images with caption features have in common, in whichever layout they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import Archive
from haste.data.latents import decode_moments
from haste.data.record import RECORD
from haste.errors import BadFile, UserError
from haste.text import CLIP_L, TextFormat

NULL = "empty_context.npy"  # the features of the empty caption


class CaptionStore(ABC):
    """Images with the features of their captions, by number; read in worker processes.

    Attributes:
        text: the format of the features; its encoder is empty if it is not known.
        null: (tokens, width), float32: the features of the empty caption.
        record: the content of prepare.json; empty without.
        has_images: whether there are images for a teacher.
        has_moments: whether there are latents; otherwise a model is trained on the images.
    """

    text: TextFormat
    null: Tensor
    record: dict[str, Any]
    has_images = True
    has_moments = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call an image."""

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """(3, R, R), uint8. Raises BadFile."""

    @abstractmethod
    def moments(self, index: int) -> np.ndarray:
        """(2C, S, S), float32: the mean and the logarithm of the variance of its latents. Raises BadFile."""

    @abstractmethod
    def count(self, index: int) -> int:
        """The number of its captions, at least 1."""

    @abstractmethod
    def features(self, index: int, choice: int) -> np.ndarray:
        """(tokens, width), float16 or float32, of one of its captions. Raises BadFile."""

    @abstractmethod
    def sentence(self, index: int, choice: int) -> str | None:
        """The text of the same caption; None if it is not known. Raises BadFile."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Plain values that identify the data; see haste.data.dataset."""

    def caption(self, index: int, choice: int) -> tuple[str | None, Tensor]:
        """A caption of an image and its features (tokens, width), float32.

        Args:
            choice: any number from 0; captions are taken modulo their count.

        Raises:
            BadFile: it cannot be read.
        """
        choice %= self.count(index)
        return self.sentence(index, choice), torch.from_numpy(self.features(index, choice)).float()


def read_null(record: dict[str, Any], places: list[Archive], flag: str) -> tuple[TextFormat, Tensor]:
    """The format of the features and those of the empty caption, of the first of the places that has them.

    Without a record the format is CLIP-L's if the shape is, else that of an encoder that is not known.

    Raises:
        UserError: none has them, or they are not of the recorded shape.
    """
    place = next((place for place in places if place.has(NULL)), None)
    if place is None:
        wanted = " or ".join(place.locate(NULL) for place in places)
        raise UserError(f"{flag} must have the features of the empty caption, {wanted}, got none")
    where = place.locate(NULL)
    try:
        null = decode_moments(place.read(NULL), where)
    except BadFile as fault:
        raise UserError(f"{fault}; it must be the features of the empty caption") from fault
    recorded = record.get("text")
    text = None if recorded is None else TextFormat.from_dict(recorded, f"text in {RECORD}")
    if null.ndim != 2 or 0 in null.shape or (text is not None and null.shape != text.shape):
        wanted = "tokens x width" if text is None else f"{text.tokens} x {text.width}, as in {RECORD}"
        raise UserError(f"{where} must hold numbers of {wanted}, got {' x '.join(map(str, null.shape))}")
    if text is None:
        text = CLIP_L if null.shape == CLIP_L.shape else TextFormat("", *null.shape)
    return text, torch.from_numpy(null)


def require_finished(record: dict[str, Any], where: str, flag: str) -> None:
    """Raise UserError for data that `haste prepare` has not finished."""
    if record and record.get("finished") is not True:
        raise UserError(f"{flag} must be finished by haste prepare --captions, whose command resumes, got {where}")
