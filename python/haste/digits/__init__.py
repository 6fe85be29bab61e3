"""Real images that need no download: scikit-learn's handwritten digits, with a teacher and a classifier.

`haste.registry` names this module; nothing else imports it. Both networks are trained once, in seconds, and kept in a
file whose name has a hash of their settings. No training run sees the classifier, and the teacher's training does not
count as the model's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from haste.data.images import to_uint8
from haste.data.loader import BatchOrder
from haste.distributed import progress_bar
from haste.errors import UserError, in_one_line, require
from haste.io import remove_abandoned, save_tensors, temporary_path, writing
from haste.metrics.features import Features
from haste.weights import load_weights

if TYPE_CHECKING:
    from transformers import Dinov2ForImageClassification

logger = logging.getLogger(__name__)

SIDE = 8  # pixels
NUM_CLASSES = 10


def load_digits() -> tuple[Tensor, Tensor]:
    """The data set.

    Source: UCI, Optical Recognition of Handwritten Digits (test part).

    Returns:
        Images (1797, 1, 8, 8), float32, ink = 1 on paper = -1; labels (1797,), int64, 0 to 9.
    """
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)  # 0 to 16
    return images / 8 - 1, torch.from_numpy(digits.target.astype(np.int64))


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, rounded to 8 bits as samples are: (1797, 8, 8, 3) uint8, labels (1797,) int64."""
    images, labels = load_digits()
    return to_uint8(images), labels.numpy()


def shift_randomly(images: Tensor) -> Tensor:
    """Shift each image (N, C, H, W) by −1, 0 or 1 pixel along both axes; paper (−1) comes in at the border."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2, count))
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    shifted = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def digest(settings: Any, length: int) -> str:
    """Hexadecimal digits that change with any setting of a dataclass."""
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:length]


# ---- the teacher: a small DINOv2-shaped ViT that learns to read the digits ----


@dataclass(frozen=True)
class TeacherConfig:
    """The ViT's shape and training. 4 x 4 tokens of 2 x 2 pixels, as the model of the digits preset has."""

    patch_size: int = 2
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    mlp_ratio: int = 4
    initializer_range: float = 0.1  # at this width, transformers' 0.02 starts far too quietly for a short run
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps over which the learning rate rises; it falls to 0 over the rest
    max_grad_norm: float = 1.0
    noise: float = 0.2
    seed: int = 0


class Teacher:
    """The entry in `haste.registry.TEACHERS`."""

    @staticmethod
    def prepare(folder: Path, settings: TeacherConfig | None = None) -> Path:
        """Return the teacher's folder inside `folder`; train the teacher first if it is missing."""
        settings = settings or TeacherConfig()
        target = folder / f"digits-vit-{digest(settings, 8)}"
        if not (target / "config.json").is_file():
            logger.info("training the teacher, a ViT that reads the digits, for %d steps", settings.steps)
            save_teacher(train_teacher(settings), target)
        return target

    @staticmethod
    def shape() -> tuple[str, int, int, int, int]:
        """Model type, width, depth, pixels per side of a patch and of an image."""
        settings = TeacherConfig()
        return ("dinov2", settings.hidden_size, settings.num_hidden_layers, settings.patch_size, SIDE)


def train_teacher(settings: TeacherConfig) -> Dinov2ForImageClassification:
    """Train a ViT on shifted, noisy digits. Leaves the global random state as it was."""
    from transformers import Dinov2Config, Dinov2ForImageClassification  # slow, and not needed for the data

    shape = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "initializer_range")
    config = Dinov2Config(
        image_size=SIDE, num_channels=1, num_labels=NUM_CLASSES, **{name: getattr(settings, name) for name in shape}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        images, labels = load_digits()
        model = Dinov2ForImageClassification(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=settings.warmup
        )
        order = BatchOrder(len(images), settings.batch_size, settings.seed)
        bar = progress_bar(range(settings.steps), desc="teacher", unit="step")
        for step in bar:
            batch = order.batch(step)
            logits = model(augment(images[batch], settings.noise)).logits
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == settings.steps - 1:
                accuracy = (logits.argmax(-1) == labels[batch]).float().mean()
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.2f}", refresh=False)
    return model.eval()


def augment(images: Tensor, noise: float) -> Tensor:
    """Shift each image by up to one pixel each way and add Gaussian noise."""
    shifted = shift_randomly(images)
    return shifted + noise * torch.randn_like(shifted)


def save_teacher(model: Dinov2ForImageClassification, target: Path) -> None:
    """Write the teacher's folder, with how its images are normalised."""
    save_model(target, [model.dinov2], {"image_mean": [0.5], "image_std": [0.5], "do_normalize": True})


def save_model(target: Path, parts: Sequence[Any], images: dict[str, Any]) -> None:
    """Write a folder of save_pretrained() under another name first: a kill leaves no half model behind.

    Args:
        parts: what is saved: a model, and its tokenizer if it has one.
        images: the content of preprocessor_config.json.
    """
    remove_abandoned(target)
    temporary = temporary_path(target)
    try:
        with writing(str(target)):
            for part in parts:
                part.save_pretrained(temporary)
            (temporary / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
            os.replace(temporary, target)
    except (UserError, SafetensorError) as error:
        if not (target / "config.json").is_file():  # where another process has put the same model
            raise UserError(in_one_line(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the classifier: what Inception is for photographs ----

BATCH = 512  # images per forward pass


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that decides the classifier's weights."""

    seed: int = 271828  # its own: no run derives anything from it
    held_out: float = 0.2
    features: int = 64
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    architecture: int = 1  # raise it when `build_network` or `train_classifier` changes

    def digest(self) -> str:
        return digest(self, 12)


class Classifier:
    """A trained classifier as an extractor of features, with its accuracy on the fifth of the digits it has not seen.

    Features, of the penultimate layer, are divided by the real digits' standard deviation per dimension, so that FDs do
    not depend on the scale that training happened to give a layer: the real digits have total variance D.
    """

    classes = NUM_CLASSES

    def __init__(
        self, network: nn.Sequential, feature_scale: Tensor, held_out_accuracy: float, settings: ClassifierConfig
    ) -> None:
        self.network = network.eval()
        self.feature_scale = feature_scale
        self.held_out_accuracy = held_out_accuracy
        self.settings = settings
        self.key = f"digits-{settings.digest()}"
        self.dimension = settings.features

    def describe(self) -> str:
        return "the classifier of the digits"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features (N, D) float64 and class probabilities (N, 10) float32 of images (N, 8, 8, 3) uint8."""
        if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
            raise UserError(
                f"images for the classifier of the digits must be uint8 (count, 8, 8, 3), got {images.dtype} "
                f"{images.shape}"
            )
        features, probabilities = [], []
        for batch in np.split(images, range(BATCH, len(images), BATCH)):
            hidden = self.network[:-1](to_network_input(batch))
            features.append((hidden / self.feature_scale).double())
            probabilities.append(self.network[-1](hidden).softmax(dim=1))
        return Features(torch.cat(features).numpy(), torch.cat(probabilities).numpy())


def to_network_input(images: np.ndarray) -> Tensor:
    """Grey images (N, 8, 8, 3) uint8 with equal channels to (N, 1, 8, 8) float32 in [−1, 1]."""
    grey = torch.from_numpy(images.astype(np.float32).mean(axis=-1, keepdims=True))
    return grey.permute(0, 3, 1, 2) / 127.5 - 1.0


def build_network(features: int) -> nn.Sequential:
    """Three convolutions, a feature layer of the given width, and a linear layer of logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(64 * 4 * 4, features), nn.SiLU(),
        nn.Linear(features, NUM_CLASSES),
    )  # fmt: skip


def load_extractor(cache: Path, settings: ClassifierConfig | None = None) -> Classifier:
    """Load the classifier from the folder `cache`; train it and save it there if it is missing."""
    settings = settings or ClassifierConfig()
    path = cache / f"digits-classifier-{settings.digest()}.pt"
    if path.exists():
        return read_classifier(path, settings)
    logger.info("training a digit classifier, used only to score samples, for %d epochs", settings.epochs)
    classifier = train_classifier(settings)
    content = {
        "network": classifier.network.state_dict(),
        "feature_scale": classifier.feature_scale,
        "held_out_accuracy": classifier.held_out_accuracy,
    }
    remove_abandoned(path)
    with writing(str(path)):
        save_tensors(path, content)
    return classifier


def read_classifier(path: Path, settings: ClassifierConfig) -> Classifier:
    saved = load_weights(path, "the file of the classifier")
    network = build_network(settings.features)
    try:
        network.load_state_dict(saved["network"])
        scale, accuracy = saved["feature_scale"], float(saved["held_out_accuracy"])
        if scale.shape != (settings.features,):
            raise ValueError(f"feature_scale has shape {tuple(scale.shape)}")
    except Exception as error:  # what another program has put there can be anything
        raise UserError(f"{path} keeps no classifier of the digits ({in_one_line(error)}); delete it") from error
    return Classifier(network, scale, accuracy, settings)


def train_classifier(settings: ClassifierConfig) -> Classifier:
    """Train on four fifths of the digits, shifted by up to one pixel. Leaves the global random state as it was."""
    digits, answers = real_digits()
    images, labels = to_network_input(digits), torch.from_numpy(answers)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(settings.seed)
        order = torch.randperm(len(labels))
        held_out, seen = order.tensor_split([round(settings.held_out * len(labels))])
        network = build_network(settings.features)
        fit_network(network, images[seen], labels[seen], settings)
    network.eval()
    with torch.no_grad():
        scale = network[:-1](images).std(dim=0).clamp_min(1e-6)
        correct = network(images[held_out]).argmax(dim=1) == labels[held_out]
    return Classifier(network, scale, correct.float().mean().item(), settings)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one core: sums are then the same on a machine with more, and batches this small gain nothing from a
    second core, but lose much to it where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_network(network: nn.Sequential, images: Tensor, labels: Tensor, settings: ClassifierConfig) -> None:
    """AdamW with one learning-rate cycle over whole batches of images (N, 1, 8, 8)."""
    batches = len(labels) // settings.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches
    )
    network.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels))[: batches * settings.batch_size]
        for chosen in order.split(settings.batch_size):
            inputs = shift_randomly(images[chosen])[:, 0].unsqueeze(1)  # NCHW strides, which decide the rounding
            logits = network(inputs)
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
