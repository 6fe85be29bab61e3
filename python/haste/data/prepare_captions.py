"""`haste prepare --captions`: images and captions become pixels, the moments of latents and text features, in either
layout."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from haste.data.archive import read_npy
from haste.data.caption_folder import CaptionFolder, Encoders, Stage
from haste.data.caption_store import NULL
from haste.data.coco_features import SENTENCES, encode_sentences
from haste.data.images import square_crop
from haste.data.latent_statistics import UNIT
from haste.data.latents import decode_moments
from haste.data.prepare import (
    Cropped,
    Cropper,
    cropped_batches,
    encode_npy,
    encode_png,
    in_batches,
    leave_out,
    usable,
)
from haste.data.shards import CAPTIONS_PER_SHARD, IMAGES_PER_SHARD, ShardFiles, shard_path, write_shard
from haste.errors import BadFile, UserError
from haste.io import write_atomically
from haste.vae import with_deviation

SPLITS = ("train", "val")  # of the public features, which have the empty caption's in the folder above

# ---- REPA's layout ----


class CocoFeatureFolder(CaptionFolder):
    """REPA's coco256_features: one file for each image, its moments and each of its captions."""

    layout = "repa"

    @property
    def null_path(self) -> Path:
        """In the folder above train and val, as REPA's scripts look for it, else in the folder itself."""
        folder = self.path.absolute()
        return (folder.parent if folder.name in SPLITS else folder) / NULL

    def create(self, encoders: Encoders) -> None:
        if self.null_path.parent != self.path.absolute() and self.null_path.is_file():
            self._check_null(encoders)
        super().create(encoders)

    def _check_null(self, encoders: Encoders) -> None:
        """Refuse the features of another encoder's empty caption, which belong to another split."""
        try:
            found = read_npy(self.null_path)
        except BadFile as fault:
            raise UserError(f"{fault}; remove it to have it written again") from fault
        if found.shape != self.text.shape or not np.allclose(found, encoders.features([""])[0], rtol=1e-2, atol=1e-3):
            raise UserError(
                f"--text-encoder must be the one of {self.null_path}, which the splits beside {self.path} have in "
                f"common, got {self.text.encoder}"
            )

    def latent_units(self) -> int:
        return -(-self.count // UNIT) if self.latents is not None else 0

    def unit_moments(self, unit: int) -> Iterator[np.ndarray]:
        for number in range(unit * UNIT, min((unit + 1) * UNIT, self.count)):
            path = self.path / f"{number}.npy"
            if path.is_file():  # others could not be read, and are left out
                yield _with_deviation(decode_moments(path.read_bytes(), str(path)))

    def space_needed(self) -> int:
        png, moments, caption = self._sizes()
        missing = self._missing(range(self.count))
        some = missing[:100]
        per_image = sum(map(self._count, some)) / max(1, len(some))
        return int(len(missing) * (_in_blocks(png) + _in_blocks(moments) + per_image * _in_blocks(caption)))

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of a complete image, its moments and the features of a caption."""
        side = self.resolution
        blank = encode_png(np.zeros((3, side, side), dtype=np.uint8))
        arrays = (np.zeros(shape, dtype=np.float32) for shape in (self.moments_shape, self.text.shape))
        return len(blank), *(len(encode_npy(array)) for array in arrays)  # type: ignore[return-value]

    def _missing(self, numbers: Iterable[int]) -> list[int]:
        """The numbers of images with a missing file. After a power failure a file may have another size."""
        png, moments, caption = self._sizes()
        sizes = {}
        if self.path.is_dir():
            sizes = {path.name: path.stat().st_size for path in self.path.iterdir()}

        def complete(number: int) -> bool:
            if sizes.get(f"{number}.png") != png or sizes.get(f"{number}.npy") != moments:
                return False
            count = self._count(number)
            return count > 0 and all(sizes.get(f"{number}_{n}.npy") == caption for n in range(count))

        return [number for number in numbers if not complete(number)]

    def _count(self, number: int) -> int:
        """The number of captions of an image; 0 if they cannot be read."""
        try:
            return len(self.source.captions(number))
        except BadFile:
            return 0

    def stages(self, encoders: Encoders, process: int, processes: int) -> Iterator[Stage]:
        numbers = range(process, self.count, processes)
        missing = self._missing(numbers)
        yield Stage("images", len(numbers), len(numbers) - len(missing), self._write_images(encoders, missing))

    def _write_images(self, encoders: Encoders, numbers: list[int]) -> Iterator[int]:
        crop = functools.partial(square_crop, size=self.resolution)
        cropper = Cropper(self.source.images, crop, self._write_image)
        for batch in cropped_batches(cropper, in_batches(numbers, encoders.batch_size), encoders.num_workers):
            captions = {cropped.number: self.captions(encoders, cropped.number) for cropped in batch}
            images = usable(batch, encoders.on_bad_file, encoders.faults)
            self._write_features(encoders, [cropped for cropped in images if captions[cropped.number]], captions)
            yield len(batch)

    def _write_image(self, number: int, pixels: np.ndarray) -> None:
        with self.writing():
            self._write(f"{number}.png", encode_png(pixels))

    def _write_features(self, encoders: Encoders, images: list[Cropped], captions: dict[int, list[str]]) -> None:
        if not images:
            return
        moments = encoders.moments(images)
        features = iter(encoders.features([text for image in images for text in captions[image.number]]))
        with self.writing():
            for position, image in enumerate(images):
                for n in range(len(captions[image.number])):
                    self._write(f"{image.number}_{n}.npy", encode_npy(next(features)))
                if moments is not None:
                    self._write(f"{image.number}.npy", encode_npy(moments[position]))

    def _write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, lambda temporary: temporary.write_bytes(data), durable=False)

    def finish(self) -> None:
        missing = set(self._missing(range(self.count)))
        whole = [number for number in range(self.count) if number not in missing]
        for number in missing:  # a photograph whose captions cannot be read, and the other way round
            for path in (self.path / f"{number}.png", self.path / f"{number}.npy"):
                path.unlink(missing_ok=True)
        sentences = encode_sentences([(number, self.source.captions(number)) for number in whole])
        with self.writing():
            write_atomically(self.path / SENTENCES, lambda temporary: temporary.write_bytes(sentences))
        self._finish(len(whole))


def _with_deviation(moments: np.ndarray) -> np.ndarray:
    """Moments (2C, S, S) with the standard deviation in place of the log-variance."""
    return with_deviation(torch.from_numpy(moments)[None])[0].numpy()


def _in_blocks(size: int) -> int:
    """What a file takes on the disk."""
    return -(-size // 4096) * 4096


# ---- the compact layout ----


class ShardFolder(CaptionFolder):
    """Shards of images and of captions that are all different."""

    layout = "shards"

    def own_settings(self) -> dict[str, object]:
        return {"per_shard": {"captions": CAPTIONS_PER_SHARD, "images": IMAGES_PER_SHARD}}

    @functools.cached_property
    def table(self) -> tuple[dict[str, int], list[list[int]], list[BadFile]]:
        """The row of each caption, the rows of each image, and the captions that cannot be read."""
        rows: dict[str, int] = {}
        of_images, faults = [], []
        for number in range(self.count):
            try:
                captions = self.source.captions(number)
            except BadFile as fault:
                faults.append(fault)
                captions = []
            of_images.append([rows.setdefault(caption, len(rows)) for caption in captions])
        return rows, of_images, faults

    def _count(self, kind: str) -> int:
        return len(self.table[0]) if kind == "captions" else self.count

    def _units(self, kind: str) -> range:
        return range(-(-self._count(kind) // self._per_shard(kind)))

    def _per_shard(self, kind: str) -> int:
        return CAPTIONS_PER_SHARD if kind == "captions" else IMAGES_PER_SHARD

    def _part(self, kind: str, unit: int) -> range:
        """The numbers of the captions or images of a shard."""
        size = self._per_shard(kind)
        return range(unit * size, min((unit + 1) * size, self._count(kind)))

    def _missing(self, kind: str, units: Iterable[int]) -> list[int]:
        return [unit for unit in units if not shard_path(self.path, kind, unit).is_file()]

    def space_needed(self) -> int:
        image = 3 * self.resolution**2 + 4 * int(np.prod(self.moments_shape)) * (self.latents is not None)
        sizes = {"images": image, "captions": 2 * self.text.tokens * self.text.width}
        units = {kind: self._missing(kind, self._units(kind)) for kind in sizes}
        return sum(size * len(self._part(kind, unit)) for kind, size in sizes.items() for unit in units[kind])

    def stages(self, encoders: Encoders, process: int, processes: int) -> Iterator[Stage]:
        for fault in self.table[2] if process == 0 or encoders.on_bad_file == "refuse" else ():
            leave_out(fault, encoders.on_bad_file, encoders.faults)
        for kind, write in (("captions", self._write_captions), ("images", self._write_images)):
            units = self._units(kind)[process::processes]
            missing = self._missing(kind, units)
            total, left = (sum(len(self._part(kind, unit)) for unit in each) for each in (units, missing))
            yield Stage(kind, total, total - left, write(encoders, missing))

    def _write_captions(self, encoders: Encoders, units: list[int]) -> Iterator[int]:
        captions = list(self.table[0])
        for unit in units:
            part = self._part("captions", unit)
            features = np.empty((len(part), *self.text.shape), dtype=np.float16)
            texts = [captions[row].encode("utf-8", "replace") for row in part]
            for batch in in_batches(range(len(part)), 4 * encoders.batch_size):
                found = encoders.features([captions[part[row]] for row in batch])
                with np.errstate(over="ignore"):
                    features[batch] = found
                if not np.isfinite(features[batch]).all():
                    raise UserError(
                        f"--layout must be repa, as features of {self.text.encoder} exceed float16, got shards"
                    )
                yield len(batch)
            ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
            text = np.frombuffer(b"".join(texts), dtype=np.uint8)
            self._write("captions", unit, {"features": features, "text": text, "ends": ends})

    def _write_images(self, encoders: Encoders, units: list[int]) -> Iterator[int]:
        of_images = self.table[1]
        batches, last = [], {}
        for unit in units:
            numbers = [number for number in self._part("images", unit) if of_images[number]]
            batches += in_batches(numbers, encoders.batch_size) or [[]]
            last[len(batches) - 1] = unit
        crop = functools.partial(square_crop, size=self.resolution)
        images: list[Cropped] = []
        moments: list[np.ndarray] = []
        cropped = cropped_batches(Cropper(self.source.images, crop), batches, encoders.num_workers)
        for position, batch in enumerate(cropped):
            found = usable(batch, encoders.on_bad_file, encoders.faults)
            images += found
            if found and (of_batch := encoders.moments(found)) is not None:
                moments.append(of_batch)
            yield len(batch)
            if position in last:
                self._write("images", last[position], self._image_arrays(images, moments))
                images, moments = [], []

    def _image_arrays(self, images: list[Cropped], moments: list[np.ndarray]) -> dict[str, np.ndarray]:
        side, rows = self.resolution, [self.table[1][image.number] for image in images]
        arrays: dict[str, np.ndarray] = {
            "number": np.array([image.number for image in images], dtype=np.int64),
            "pixels": np.empty((len(images), 3, side, side), dtype=np.uint8),
            "captions": np.array([row for own in rows for row in own], dtype=np.int64),
            "ends": np.cumsum([len(own) for own in rows], dtype=np.int64),
        }
        for position, image in enumerate(images):
            if image.pixels is not None:
                arrays["pixels"][position] = image.pixels.numpy()
        if self.latents is not None:
            empty = np.empty((0, *self.moments_shape), dtype=np.float32)
            arrays["moments"] = np.concatenate([empty, *moments])
        return arrays

    def _write(self, kind: str, unit: int, arrays: dict[str, np.ndarray]) -> None:
        with self.writing():
            write_shard(shard_path(self.path, kind, unit), arrays)

    def latent_units(self) -> int:
        return len(self._units("images")) if self.latents is not None else 0

    def unit_moments(self, unit: int) -> Iterator[np.ndarray]:
        yield from map(_with_deviation, ShardFiles().array(shard_path(self.path, "images", unit), "moments"))

    def finish(self) -> None:
        files = ShardFiles()
        held = sum(len(files.array(shard_path(self.path, "images", unit), "number")) for unit in self._units("images"))
        self._finish(held, captions=len(self.table[0]))


LAYOUTS: dict[str, type[CaptionFolder]] = {"shards": ShardFolder, "repa": CocoFeatureFolder}
