"""The network that scores samples of CIFAR-10: a small residual network, which no run has seen."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from haste.digits import digest
from haste.distributed import progress_bar
from haste.evaluation.features import Features, choose_device
from haste.io import save_tensors
from haste.weights import load_weights
from images import CLASSES, augment
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BATCH = 500


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that decides its weights."""

    epochs: int = 4
    width: int = 32
    features: int = 64
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 271828  # its own: no run derives anything from it


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.branch(x))


def build_network(settings: ClassifierSettings) -> nn.Sequential:
    """Two steps down to 8 x 8, a residual block at 16 and at 8, a feature layer, a linear layer of logits."""
    width = settings.width

    def down(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.SiLU()]

    return nn.Sequential(
        *down(3, width), Residual(width), *down(width, 2 * width), Residual(2 * width), *down(2 * width, 4 * width),
        nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(4 * width * 16, settings.features), nn.SiLU(),
        nn.Linear(settings.features, CLASSES),
    )  # fmt: skip


class Classifier:
    """A trained classifier as an extractor of features, each divided by its deviation over the training images."""

    classes = CLASSES

    def __init__(
        self, network: nn.Sequential, scale: Tensor, held_out_accuracy: float, settings: ClassifierSettings
    ) -> None:
        self.device = choose_device()
        self.network = network.eval().to(self.device)
        self.scale = scale
        self.held_out_accuracy = held_out_accuracy
        self.key = f"cifar10-{digest(settings, 12)}"
        self.dimension = settings.features

    def describe(self) -> str:
        return "a classifier of CIFAR-10"

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features (N, D) float64 and class probabilities (N, 10) of images (N, 32, 32, 3) uint8."""
        features, probabilities = [], []
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH):
            hidden = self.network[:-1](part.to(self.device).float() / 127.5 - 1)
            features.append(hidden.cpu().double() / self.scale)
            probabilities.append(self.network[-1](hidden).softmax(dim=1).cpu())
        return Features(torch.cat(features).numpy(), torch.cat(probabilities).numpy())


def load_classifier(
    folder: Path, settings: ClassifierSettings, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Classifier:
    """The classifier that `folder` keeps; trained on `train` first if it is missing.

    Args:
        train, test: images (N, 3, 32, 32) uint8 and classes (N,) int64.
    """
    path = folder / f"cifar10-classifier-{digest(settings, 8)}.pt"
    network = build_network(settings)
    if not path.is_file():
        logger.info("training the classifier, used only to score samples, for %d epochs", settings.epochs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = build_network(settings)
            fit(network, settings, *train)
        new = Classifier(network, torch.ones(settings.features), 0.0, settings)
        known = new(as_arrays(train[0][::5]))
        accuracy = float((new(as_arrays(test[0])).predictions == test[1].numpy()).mean())
        scale = torch.from_numpy(known.values.std(axis=0)).clamp_min(1e-6)
        save_tensors(path, {"network": network.cpu().state_dict(), "scale": scale, "held_out_accuracy": accuracy})
    saved = load_weights(path, "the file of the classifier")
    network.load_state_dict(saved["network"])
    return Classifier(network, saved["scale"], float(saved["held_out_accuracy"]), settings)


def as_arrays(images: Tensor) -> np.ndarray:
    """(N, 3, S, S) to (N, S, S, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def fit(network: nn.Sequential, settings: ClassifierSettings, images: Tensor, labels: Tensor) -> None:
    """AdamW with one learning-rate cycle over whole batches."""
    device, batches = choose_device(), len(labels) // settings.batch_size
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay, fused=True)
    total = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=total)
    with progress_bar(total=total, desc="classifier", unit="step") as bar:
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(labels))[: batches * settings.batch_size].split(settings.batch_size):
                logits = network(augment(images[chosen].float() / 127.5 - 1).to(device))
                loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=settings.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
