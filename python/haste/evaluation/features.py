"""Networks that turn images into features: FID's Inception, any vision teacher, and what plug-ins bring.

    inception:PATH      Inception v3 from weights on disk, 2,048 features and class probabilities
    digits              the classifier of the digits, 64 features and class probabilities
    anything else       a teacher by name or folder, as --enc-type of haste train takes it: its class token after the
                        last layer (with DINOv2 and DINOv3 after the final norm, which is FD-DINOv2's feature; Stein et
                        al., arXiv 2306.04675), or the mean of its patch tokens where it has no class token

They run on the GPU, if there is one, in single precision.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.data.archive import read_npz
from haste.data.images import ImageArray, ImageSet, write_arrays
from haste.errors import BadFile, UserError
from haste.evaluation.inception import FEATURES, load_inception
from haste.registry import EXTRACTORS, plugin

INCEPTION = "inception:"
TEACHER_PIXELS = 224  # per side, as FD-DINOv2; less where an encoder was made for less
SHARD = 1024  # images whose features are kept in one file


@dataclass(frozen=True)
class Features:
    """What a network returns for N images.

    values: (N, D), float32 or float64, finite.
    probabilities: (N, classes) where the network is a classifier.
    """

    values: np.ndarray
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return self.values.shape[1]

    @property
    def predictions(self) -> np.ndarray:
        """The most probable classes (N,), int64."""
        return self.probabilities.argmax(axis=1)


@contextmanager
def single_precision() -> Iterator[None]:
    """Compute without TF32, which NVIDIA GPUs otherwise round convolutions to: published distances are without it."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = saved


class Extractor(Protocol):
    """A network with its own preparation of images.

    key: fit for a file's name, changes with the weights.
    dimension: features of an image.
    classes: how many, where they are those of the data that models are trained on; else None.
    held_out_accuracy: of such a classifier, from 0 to 1; else NaN.
    """

    key: str
    dimension: int
    classes: int | None
    held_out_accuracy: float

    def describe(self) -> str: ...

    def __call__(self, images: np.ndarray) -> Features:
        """Features of one batch (n, H, W, 3) uint8."""


class InceptionExtractor:
    """FID's Inception, from either of its files."""

    classes: int | None = None  # ImageNet's in another order
    held_out_accuracy = math.nan

    def __init__(self, path: Path) -> None:
        self.device = choose_device()
        self.network = load_inception(path).to(self.device)
        self.path = path
        self.dimension = FEATURES
        self.key = "inception-" + hashlib.sha256(path.read_bytes()).hexdigest()[:12]

    def describe(self) -> str:
        return f"Inception v3 ({self.path.name})"

    @torch.no_grad()
    @single_precision()
    def __call__(self, images: np.ndarray) -> Features:
        features, probabilities = self.network(channels_first(images).to(self.device))
        return Features(features.float().cpu().numpy(), probabilities.float().cpu().numpy())


class TeacherExtractor:
    """A vision transformer by its class token, or else the mean of its patch tokens."""

    classes: int | None = None
    held_out_accuracy = math.nan

    def __init__(self, name: str) -> None:
        # transformers takes a second to import.
        from haste.teachers.encoder import VisionTeacher
        from haste.teachers.families import find_family, resolve_teacher
        from haste.teachers.loading import load_config, own_image_size

        config = load_config(name, resolve_teacher(name), "--features")
        self.pixels = min(own_image_size(name, config), TEACHER_PIXELS)
        self.device = choose_device()
        self.teacher = VisionTeacher.from_pretrained(name, image_size=self.pixels).to(self.device)
        self.family = find_family(name, config)
        self.dimension = self.teacher.width
        short = re.sub(r"[^\w.-]+", "-", Path(name).name)
        self.key = f"{short}-{self.pixels}-{digest_of_weights(self.teacher.encoder)}"

    @property
    def token(self) -> str:
        return "class token" if self.teacher.prefix else "mean patch token"

    def describe(self) -> str:
        return f"{self.token} of {self.teacher.name} at {self.pixels} pixels"

    @torch.no_grad()
    @single_precision()
    def __call__(self, images: np.ndarray) -> Features:
        teacher = self.teacher
        resized = resize_smoothly(channels_first(images).to(self.device), self.pixels)
        if teacher.num_channels == 1:
            resized = resized.mean(dim=1, keepdim=True)
        pixels = teacher.preprocess(resized / 127.5 - 1.0)
        tokens = teacher.encoder(pixels, **self.family.forward_arguments(pixels, teacher.grid**2)).last_hidden_state
        features = tokens[:, 0] if teacher.prefix else tokens.mean(dim=1)
        return Features(features.float().cpu().numpy())


def load_extractor(name: str, classifier_dir: Path) -> Extractor:
    """The network that --features names.

    classifier_dir: the folder in which a plug-in keeps its network. Raises UserError for what is no name, file or
    folder of one.
    """
    if name in EXTRACTORS:
        return plugin(EXTRACTORS, name)(classifier_dir)
    if name.startswith(INCEPTION):
        return InceptionExtractor(Path(name.removeprefix(INCEPTION)).expanduser())
    if name == "inception" or Path(name).suffix in (".pt", ".pth"):
        raise UserError(f"--features is {name}; Inception's weights are given as inception:PATH")
    try:
        return TeacherExtractor(name)
    except UserError as error:
        if str(error).startswith("--features"):
            raise
        raise UserError(
            f"--features must be inception:PATH, stored, {', '.join(EXTRACTORS)} or a teacher, got {name}: {error}"
        ) from error


def extract(
    extractor: Extractor,
    images: np.ndarray | ImageSet,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
    cache: Path | None = None,
) -> Features:
    """Features of all images, batch by batch.

    Args:
        images: (N, H, W, 3) uint8, or a set of them.
        progress: called with the number of images of each batch.
        cache: the folder that keeps features, by SHARD images, so that a killed command resumes and a second one reads
            them.

    Raises:
        UserError: features are not finite, or images cannot be read.
    """
    images = ImageArray(images) if isinstance(images, np.ndarray) else images
    parts = []
    for start in range(0, len(images), SHARD):
        stop = min(start + SHARD, len(images))
        file = None if cache is None else cache / extractor.key / f"{start:08d}.npz"
        part = None if file is None else read_shard(file, images.digest(start, stop))
        if part is None:
            part = extract_range(extractor, images, batch_size, start, stop, progress)
            if file is not None:
                write_shard(file, part, images.digest(start, stop))
        else:
            progress(stop - start)
        parts.append(part)
    return concatenate(parts)


def extract_range(
    extractor: Extractor, images: ImageSet, batch_size: int, start: int, stop: int, progress: Callable[[int], None]
) -> Features:
    """Features of images start, …, stop − 1."""
    parts = []
    for batch in images.batches(batch_size, start, stop):
        part = extractor(batch)
        probabilities = np.zeros(0) if part.probabilities is None else part.probabilities
        if not (np.isfinite(part.values).all() and np.isfinite(probabilities).all()):
            raise UserError(
                f"features of {extractor.describe()} hold values that are not finite; its weights are broken"
            )
        parts.append(part)
        progress(len(batch))
    return concatenate(parts)


def concatenate(parts: Iterable[Features]) -> Features:
    """One set after the other."""
    parts = list(parts)
    values = np.concatenate([part.values for part in parts])
    if parts[0].probabilities is None:
        return Features(values)
    return Features(values, np.concatenate([part.probabilities for part in parts]))


def read_shard(path: Path, digest: str) -> Features | None:
    """Features that were kept of images with this digest; None if there are none, or they are of others."""
    if not path.is_file():
        return None
    try:
        arrays = read_npz(path, ("digest", "values", "probabilities"))
    except BadFile:  # made anew
        return None
    if "values" not in arrays or str(arrays.get("digest")) != digest:
        return None
    return Features(arrays["values"], arrays.get("probabilities"))


def write_shard(path: Path, features: Features, digest: str) -> None:
    """Keep features of images with this digest."""
    arrays = {"values": features.values, "digest": np.array(digest)}
    if features.probabilities is not None:
        arrays["probabilities"] = features.probabilities
    write_arrays(path, arrays)


def channels_first(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to a tensor (N, 3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def resize_smoothly(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 to float32 (N, C, size, size), 0 … 255: bicubic with antialiasing and rounding, as Pillow."""
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).round().clamp(0.0, 255.0)


def choose_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digest_of_weights(network: nn.Module) -> str:
    """Twelve hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
