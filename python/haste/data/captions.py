"""Training data whose condition is a caption: stored features in either layout, and small sets in memory.

Each use of an image takes one of its captions by chance. Features are those of a text encoder, made once by
`haste prepare --captions`, or for a set in memory when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from haste.data.archive import Archive, Folder, open_archive
from haste.data.caption_store import CaptionStore
from haste.data.coco_features import CocoFeatures, are_coco_features, folders_of_coco_features
from haste.data.dataset import Batch, TrainingData, checksum, to_unit
from haste.data.loader import MOST_BAD_NEIGHBOURS
from haste.data.record import COCO_LATENTS, RECORD, latent_format, read_record
from haste.data.shards import Shards, is_sharded
from haste.errors import BadFile, OnBadFile, UserError
from haste.text import TextEncoder, TextFormat
from haste.vae import VAE, LatentFormat, with_deviation

T = TypeVar("T")


class CaptionedImages(NamedTuple):
    """A small data set, as a plug-in of `haste.registry.DATASETS` may return it.

    Attributes:
        images: (M, C, S, S), float32 in [-1, 1].
        captions: of each image, one or more.
        encoder: folder or hub name of the text encoder.
    """

    images: Tensor
    captions: list[list[str]]
    encoder: str


def open_captions(path: str | Path, flag: str = "--prompts") -> CaptionStore:
    """Open the captions of stored data in either layout, in the order of the images.

    Args:
        path: the folder, such as coco256_features/val, or what `haste prepare --captions` wrote.
        flag: that named it, for messages.

    Raises:
        UserError: it is no such folder, or has missing or extra files.
    """
    path = Path(path).expanduser()
    archive = open_archive(path, flag)
    store = find_captions(archive, archive.names(), path, flag)
    if store is None:
        raise UserError(
            f"{flag} must be a folder with features of captions, as of haste prepare --captions, got {path}"
        )
    return store


def find_captions(
    archive: Archive, names: list[str], path: Path, flag: str, on_bad_file: OnBadFile = "refuse"
) -> CaptionStore | None:
    """The captions among the files of a folder or zip, in either layout; None if there are none.

    Raises:
        UserError: missing or extra files, or the layout one folder further down.
    """
    if isinstance(archive, Folder) and archive.has(RECORD) and is_sharded(read_record(archive)):
        return Shards(path, flag, on_bad_file)
    if are_coco_features(names):
        return CocoFeatures(archive, names, path, flag, on_bad_file)
    below = folders_of_coco_features(names)
    if below:
        raise UserError(
            f"{flag} must be one of the folders {', '.join(below)} in {path}, which have captions, got {path}"
        )
    return None


class Captioned(NamedTuple):
    """pixels: uint8, (3, R, R), or empty without a teacher; moments: float32, (2C, S, S), mean and log-variance, or
    empty for pixels; features: (tokens, width), float16 or float32; or batches of these."""

    pixels: Tensor
    moments: Tensor
    features: Tensor


class _WithCaptions(TrainingData):
    """What data with captions has in common."""

    unmirrored = "data with captions, which may speak of left and right"

    def example(self, index: int) -> tuple[str | None, Tensor]:
        """A caption of an image and its features (tokens, width). Raises BadFile."""
        raise NotImplementedError

    def sentence(self, index: int) -> str | None:
        """The text of the same caption. Raises BadFile."""
        raise NotImplementedError

    def examples(self, count: int) -> tuple[Tensor, list[str]]:
        """Features (count, tokens, width) of captions of images spread over all, and their texts."""
        found = [self._readable(self.example, index) for index in _spread(len(self), count)]
        titles = [f"caption {number}" if text is None else text for number, (text, _) in enumerate(found)]
        return torch.stack([features for _, features in found]), titles

    def captions(self, count: int) -> list[str] | None:
        """The texts of at most `count` captions of images spread over all; None if texts are not known."""
        found = (self._readable(self.sentence, index) for index in _spread(len(self), min(count, len(self))))
        texts = [text for text in found if text is not None]
        return texts or None

    def _readable(self, read: Callable[[int], T], index: int) -> T:
        """Of an image, or of the next one that can be read: a bad file is for the loader to report."""
        for offset in range(min(len(self), MOST_BAD_NEIGHBOURS)):
            try:
                return read((index + offset) % len(self))
            except BadFile as fault:
                last = fault
        raise last.as_user_error()


def _spread(length: int, count: int) -> list[int]:
    return [number * length // count for number in range(count)]


class CaptionData(_WithCaptions):
    """Stored images with the features of their captions.

    Args:
        latents: the format of the stored latents, or of those that `vae` makes; None trains on pixels.
        vae: encodes the images of a store without latents.
    """

    def __init__(
        self,
        store: CaptionStore,
        resolution: int,
        latents: LatentFormat | None,
        vae: VAE | None = None,
        on_bad_file: OnBadFile = "refuse",
    ) -> None:
        super().__init__(resolution, 1, latents, on_bad_file=on_bad_file)
        self.store = store
        self.text, self.null = store.text, store.null
        self._format, self._vae = latents, vae
        self._with_images = store.has_images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}  # not needed in worker processes

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Captioned:
        return self.read(index, 0)

    def read(self, index: int, chance: int) -> Captioned:
        """An image with the one of its captions that `chance` chooses. Raises BadFile."""
        needs_pixels = self._with_images or not self.store.has_moments
        pixels = self._read_pixels(index) if needs_pixels else np.empty(0, dtype=np.uint8)
        moments = self._read_moments(index) if self.store.has_moments else np.empty(0, dtype=np.float32)
        features = self.store.features(index, chance % self.store.count(index))
        return Captioned(*map(torch.from_numpy, (pixels, moments, features)))

    def _read_pixels(self, index: int) -> np.ndarray:
        pixels, size = self.store.pixels(index), self.resolution
        if pixels.shape != (3, size, size):
            found = f"{pixels.shape[2]} x {pixels.shape[1]}"
            where = self.store.name(index)
            raise BadFile(where, f"must have an image of {size} x {size} pixels, as --resolution, got {found}")
        return pixels

    def _read_moments(self, index: int) -> np.ndarray:
        moments, shape = self.store.moments(index), (2 * self.channels, self.input_size, self.input_size)
        if moments.shape != shape:
            wanted, found = (" x ".join(map(str, sizes)) for sizes in (shape, moments.shape))
            why = f"must hold {wanted} numbers for --resolution {self.resolution}, got {found}"
            raise BadFile(self.store.name(index), why)
        return moments

    def to_batch(self, raw: Captioned, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        """Latents are (mean + exp(½·clip(logvar, −30, 20))·ε − shift)·scale."""
        condition = raw.features.to(device, non_blocking=True).float()
        images = to_unit(raw.pixels.to(device, non_blocking=True)) if raw.pixels.dim() == 4 else None
        if self._format is None:
            assert images is not None  # without moments pixels are always read
            return Batch(images, images, condition)
        if self.store.has_moments:
            moments = with_deviation(raw.moments.to(device, non_blocking=True))
        else:
            assert self._vae is not None and images is not None
            moments = self._vae.to(device).encode(images)
        return Batch(self._format.sample_posterior(moments, generator), images, condition)

    def example(self, index: int) -> tuple[str | None, Tensor]:
        return self.store.caption(index, 0)

    def sentence(self, index: int) -> str | None:
        return self.store.sentence(index, 0)

    def fingerprint(self) -> dict[str, Any]:
        return self.store.fingerprint()

    def require_images(self) -> None:
        if not self.store.has_images:
            where = self.store.name(0)
            raise UserError(f"--data-dir must have N.png beside N.npy for the teacher of --enc-type, got only {where}")

    def without_images(self) -> CaptionData:
        data = self._copy()
        data._with_images = False
        return data


def caption_data(
    store: CaptionStore,
    where: str,
    resolution: int,
    vae: str | None,
    vae_stats: str | None,
    on_bad_file: OnBadFile,
    num_classes: int | None,
) -> CaptionData:
    """Training data of stored captions, with the settings of `haste train`. Raises UserError if these do not fit."""
    if num_classes not in (None, 1):  # a run records 1
        raise UserError(f"--num-classes must be left out for data with captions, got {num_classes}")
    if store.has_moments:
        latents = latent_format(store.record, where, vae, vae_stats, COCO_LATENTS)
        return CaptionData(store, resolution, latents, None, on_bad_file)
    if vae is None:
        if vae_stats is not None:
            raise UserError(f"--vae-stats must come with --vae or latents, got {vae_stats} alone")
        return CaptionData(store, resolution, None, None, on_bad_file)
    latents = LatentFormat.of(vae, vae_stats, resolution)
    return CaptionData(store, resolution, latents, VAE(latents), on_bad_file)


class InMemoryCaptions(_WithCaptions):
    """Images and the features of all their captions on the training device; a sample is a pair of numbers.

    Raises:
        UserError: an image without a caption, or an encoder that cannot be loaded.
    """

    reads_files = False

    def __init__(self, data: CaptionedImages, encode: Callable[[Sequence[str]], Tensor], text: TextFormat) -> None:
        super().__init__(data.images.shape[-1], 1, channels=data.images.shape[1])
        if len(data.captions) != len(data.images) or not all(data.captions):
            raise UserError(
                f"--data-dir must have a caption for each of its {len(data.images)} images, got "
                f"{sum(map(bool, data.captions))}"
            )
        rows: dict[str, int] = {"": 0}
        self._rows = [[rows.setdefault(caption, len(rows)) for caption in captions] for captions in data.captions]
        self._texts = list(rows)
        self._images, self._features = data.images, encode(self._texts).cpu()
        self.text, self.null = text, self._features[0].clone()

    @classmethod
    def of(cls, data: CaptionedImages) -> InMemoryCaptions:
        """Load the encoder, encode all captions once, and free it."""
        text = TextFormat.of(data.encoder, "--data-dir")
        return cls(data, TextEncoder(text, "--data-dir").encode, text)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.read(index, 0)

    def read(self, index: int, chance: int) -> tuple[int, int]:
        """The numbers of an image and of the one of its captions that `chance` chooses."""
        return index, self._rows[index][chance % len(self._rows[index])]

    def collate(self, samples: list[tuple[int, int]]) -> Tensor:
        return torch.tensor(samples)

    def to_batch(self, raw: Tensor, device: torch.device, generator: torch.Generator | None = None) -> Batch:
        self._images, self._features = self._images.to(device), self._features.to(device)
        indices = raw.to(device, non_blocking=True)
        images = self._images[indices[:, 0]]
        return Batch(images, images, self._features[indices[:, 1]])

    def example(self, index: int) -> tuple[str | None, Tensor]:
        return self.sentence(index), self._features[self._rows[index][0]].cpu()

    def sentence(self, index: int) -> str:
        return self._texts[self._rows[index][0]]

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "names": checksum(json.dumps([self._texts, self._rows]).encode())}
