"""Networks that turn images into features: FID's Inception, any vision teacher, and what plug-ins bring.

    inception:PATH      Inception v3 from weights on disk, 2,048 features and class probabilities
    pytorch-fid:PATH    the same network with images resized as pytorch-fid and U-ViT do, for their reference statistics
    digits              the classifier of the digits, 64 features and class probabilities
    anything else       a teacher by name or folder, as for --enc-type of haste train: its class token after the last
                        layer (of DINOv2 and DINOv3 after the final norm, which is FD-DINOv2's feature; Stein et al.,
                        arXiv 2306.04675), or the mean of the patch tokens of an encoder without a class token

Networks run in single precision, on the GPU if there is one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.data.archive import read_npz, write_arrays
from haste.data.images import ImageArray, ImageSet
from haste.distributed import progress_bar
from haste.errors import BadFile, UserError
from haste.metrics.inception import FEATURES, Resizing, load_inception
from haste.registry import EXTRACTORS, FEATURE_DIMENSIONS, plugin

INCEPTION, PYTORCH_FID = "inception:", "pytorch-fid:"
TEACHER_PIXELS = 224  # per side, as for FD-DINOv2; less for encoders of smaller images
SHARD = 1024  # images per file of the feature cache


@dataclass(frozen=True)
class Features:
    """The output of a network for N images.

    Attributes:
        values: (N, D), float32 or float64, finite.
        probabilities: (N, classes), if the network is a classifier.
        spatial: (N, D_s), float32, of an earlier layer without its mean over positions, for sFID; of Inception alone.
    """

    values: np.ndarray
    probabilities: np.ndarray | None = None
    spatial: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return self.values.shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is of values, probabilities and spatial, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @property
    def predictions(self) -> np.ndarray:
        """The most probable classes (N,), int64, of a classifier."""
        assert self.probabilities is not None
        return self.probabilities.argmax(axis=1)


@contextmanager
def single_precision() -> Iterator[None]:
    """Disable TF32, to which NVIDIA GPUs otherwise round convolutions: published FDs were computed without it."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = saved


class Extractor(Protocol):
    """A network with its preprocessing.

    Attributes:
        key: a file name that changes with the weights.
        dimension: features per image.
        classes: the number of classes of a classifier of the training data; None for other networks.
        held_out_accuracy: of such a classifier, from 0 to 1; NaN for other networks.
    """

    key: str
    dimension: int
    classes: int | None
    held_out_accuracy: float

    def describe(self) -> str:
        """The network's name in texts."""

    def __call__(self, images: np.ndarray) -> Features:
        """Features of one batch (n, H, W, 3) uint8."""


@runtime_checkable
class PromptReader(Extractor, Protocol):
    """An extractor that reads on samples what their prompts asked for.

    Attributes:
        prompts: of an evaluation; image i has prompt i modulo their number.
        rates: what `read` returns, by name, with a title for each.
    """

    prompts: list[str]
    rates: dict[str, str]

    def read(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
        """How often images (N, H, W, 3) uint8 show what was asked for, from 0 to 1; None for what no prompt names."""


class InceptionExtractor:
    """FID's Inception, from either of its public files. Its features come with spatial ones.

    Args:
        path: the weights.
        resized: as "tensorflow", in which FID was published, or "pytorch-fid".
    """

    classes: int | None = None  # not the training data's: ImageNet's classes in another order
    held_out_accuracy = math.nan
    spatial = True

    def __init__(self, path: Path, resized: Resizing = "tensorflow") -> None:
        self.device = choose_device()
        self.network = load_inception(path).to(self.device)
        self.path = path
        self.resized = resized
        self.dimension = FEATURES
        kind = "inception" if resized == "tensorflow" else resized
        self.key = f"{kind}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"

    def describe(self) -> str:
        return f"Inception v3 ({self.path.name}{'' if self.resized == 'tensorflow' else ', as ' + self.resized})"

    @torch.no_grad()
    @single_precision()
    def __call__(self, images: np.ndarray) -> Features:
        features, spatial, probabilities = self.network(channels_first(images).to(self.device), self.resized)
        return Features(*(found.float().cpu().numpy() for found in (features, probabilities, spatial)))


class TeacherExtractor:
    """The class token of a vision transformer, or the mean of its patch tokens if it has none."""

    classes: int | None = None
    held_out_accuracy = math.nan

    def __init__(self, name: str) -> None:
        # Imported here, as transformers takes a second to import.
        from haste.teachers.encoder import VisionTeacher
        from haste.teachers.families import find_family, resolve_teacher
        from haste.teachers.loading import load_config, own_image_size

        config = load_config(name, resolve_teacher(name, "a teacher"), "--features")
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
    """Load the network that --features names; a plug-in keeps its own in `classifier_dir`. Raises UserError."""
    if name in EXTRACTORS:
        return plugin(EXTRACTORS, name)(classifier_dir)
    if name.startswith(INCEPTION):
        return InceptionExtractor(Path(name.removeprefix(INCEPTION)).expanduser())
    if name.startswith(PYTORCH_FID):
        return InceptionExtractor(Path(name.removeprefix(PYTORCH_FID)).expanduser(), "pytorch-fid")
    if name == "inception" or Path(name).suffix in (".pt", ".pth"):
        raise UserError(f"--features must be inception:PATH for Inception's weights, got {name}")
    try:
        return TeacherExtractor(name)
    except UserError as error:
        if str(error).startswith("--features"):
            raise
        names = f"inception:PATH, pytorch-fid:PATH, stored, {', '.join(EXTRACTORS)} or a teacher"
        raise UserError(f"--features must be {names}, got {name}: {error}") from error


def feature_dimension(name: str) -> int | None:
    """The number of features of a network that --features names, without loading it; None if that is not known."""
    if name in FEATURE_DIMENSIONS:
        return FEATURE_DIMENSIONS[name]
    if name.startswith((INCEPTION, PYTORCH_FID)):
        return FEATURES
    from haste.teachers.loading import shape_of

    shape = shape_of(name)
    return None if shape is None else shape.width


def extract(
    extractor: Extractor,
    images: np.ndarray | ImageSet,
    batch_size: int = 64,
    cache: Path | None = None,
    title: str | None = None,
) -> Features:
    """Compute the features of all images, batch by batch.

    Args:
        images: (N, H, W, 3) uint8, or an image set.
        cache: a folder that keeps the features, in files of SHARD images: a killed command resumes from them.
        title: of a progress bar; None for no bar.

    Raises:
        UserError: features are not finite, or images cannot be read.
    """
    images = ImageArray(images) if isinstance(images, np.ndarray) else images
    parts = []
    with progress_bar(total=len(images), unit="image", desc=title, disable=title is None) as bar:
        for start in range(0, len(images), SHARD):
            stop = min(start + SHARD, len(images))
            file = None if cache is None else cache / extractor.key / f"{start:08d}.npz"
            part = None if file is None else read_shard(file, images.digest(start, stop), has_spatial(extractor))
            if part is None:
                batches = []
                for batch in images.batches(batch_size, start, stop):
                    batches.append(checked(extractor(batch), extractor))
                    bar.update(len(batch))
                part = concatenate(batches)
                if file is not None:
                    write_shard(file, part, images.digest(start, stop))
            else:
                bar.update(stop - start)
            parts.append(part)
    return concatenate(parts)


def has_spatial(extractor: Extractor) -> bool:
    """Whether a network's features come with spatial ones: it has `spatial` = True."""
    return getattr(extractor, "spatial", False)


def checked(features: Features, extractor: Extractor) -> Features:
    """The same features; UserError if they are not finite."""
    if not all(np.isfinite(array).all() for array in features.arrays().values()):
        raise UserError(f"features of {extractor.describe()} are not finite; its weights are broken")
    return features


def concatenate(parts: Iterable[Features]) -> Features:
    """One set of features after the other; with probabilities and spatial features only if all have them."""
    arrays = [part.arrays() for part in parts]
    shared = [name for name in arrays[0] if all(name in part for part in arrays)]
    return Features(**{name: np.concatenate([part[name] for part in arrays]) for name in shared})


def read_shard(path: Path, digest: str, spatial: bool = False) -> Features | None:
    """The cached features of images with this digest; None if there are none, or they belong to other images, or lack
    the spatial ones that are wanted, as those of earlier versions."""
    try:
        arrays = read_npz(path, ("digest", "values", "probabilities", "spatial"))
    except BadFile:  # missing or damaged: computed again
        return None
    if "values" not in arrays or str(arrays.pop("digest", "")) != digest or (spatial and "spatial" not in arrays):
        return None
    return Features(**arrays)


def write_shard(path: Path, features: Features, digest: str) -> None:
    """Cache the features of images with this digest."""
    write_arrays(path, {**features.arrays(), "digest": np.array(digest)})


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
    """A hash of all weights, 12 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
