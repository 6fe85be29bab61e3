"""The classifier of the digits: a small convolutional network that no training run ever sees.

It plays the part that Inception plays for photographs. Its penultimate layer gives the features for FD, its predictions
the label accuracy of samples. It is trained once in a few seconds, on a fixed four fifths of the digits; the accuracy
on the last fifth is how far its predictions can be trusted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.data.images import to_uint8
from haste.digits import load_digits
from haste.errors import UserError, in_one_line
from haste.evaluation.features import Features
from haste.io import remove_abandoned, save_tensors, writing
from haste.weights import load_weights

logger = logging.getLogger(__name__)

NUM_CLASSES = 10
BATCH = 512  # images per forward pass


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that decides the classifier's weights. Its hash names the file that keeps them."""

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
        """Twelve hex digits that change with any setting."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Classifier:
    """A trained classifier as an extractor of features, with its accuracy on digits it has not seen.

    Features are divided by the real digits' standard deviation per dimension, so that FDs do not depend on the scale
    that training happened to give a layer: the real digits have total variance D.
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
        if images.ndim != 4 or images.shape[1:] != (8, 8, 3) or images.dtype != np.uint8:
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
    """Three convolutions, a feature layer of the given width, and one linear layer of answers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(64 * 4 * 4, features), nn.SiLU(),
        nn.Linear(features, NUM_CLASSES),
    )  # fmt: skip


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """All real digits through the same 8-bit rounding as samples: (1797, 8, 8, 3) uint8, labels (1797,) int64."""
    images, labels = load_digits()
    return to_uint8(images), labels.numpy()


def load_extractor(cache: Path, settings: ClassifierConfig | None = None) -> Classifier:
    """The classifier with these settings: from the folder `cache` if it is there, else trained and saved there."""
    settings = settings or ClassifierConfig()
    path = cache / f"digits-classifier-{settings.digest()}.pt"
    if path.exists():
        return read_classifier(path, settings)
    logger.info("training the classifier of the digits, which no run sees, for %d epochs", settings.epochs)
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
    """The classifier that a file keeps; UserError if it keeps none."""
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
    """Train on the settings' share of the real digits, shifted by up to one pixel. Leaves torch's seed as it was."""
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
    """Run torch's operations on one core: sums then come out the same on a machine with more of them, and batches this
    small gain nothing from a second one, but lose much to it where other programs are at work."""
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
            answers = network(shift_randomly(images[chosen]))
            loss = F.cross_entropy(answers, labels[chosen], label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def shift_randomly(images: Tensor) -> Tensor:
    """Move each image (N, 1, H, W) by −1, 0 or 1 pixel along both axes; black (−1) comes in at the border."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    rows = torch.randint(0, 3, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 3, (count, 1)) + torch.arange(width)
    image = torch.arange(count)[:, None, None]
    return padded[image, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
