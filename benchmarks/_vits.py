"""Small vision transformers to align with, trained in minutes on the images of a benchmark, with labels or without.

    labels     cross-entropy of the class, from the class token and the mean of the patches
    masked     masked image modelling (SimMIM, arXiv 2111.09886): the pixels of the patches that are hidden
    distilled  self-distillation (DINO, arXiv 2104.14294): a view's prototypes from another view's, by the EMA weights
    untrained  random weights

Each is kept in a folder of save_pretrained() named by its settings, which --enc-type takes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from haste._compat import lerp_all_
from haste.data.loader import BatchOrder
from haste.digits import digest, save_model
from haste.distributed import progress_bar
from torch import Tensor, nn

import haste_ext

if TYPE_CHECKING:
    from transformers import Dinov2Model

logger = logging.getLogger(__name__)

Augment = Callable[[Tensor], Tensor]
"""Images (B, C, S, S) in [-1, 1] to another view of them."""

PROTOTYPES, MOMENTUM, CENTER_MOMENTUM = 128, 0.99, 0.9
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass(frozen=True)
class ViTSettings:
    """Shape and training. The defaults are those of the teacher that comes with the digits."""

    objective: Literal["labels", "masked", "distilled", "untrained"] = "labels"
    image_size: int = 8
    num_channels: int = 1
    patch_size: int = 2
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    initializer_range: float = 0.1
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    masked: float = 0.5
    seed: int = 0


def prepare_vit(
    folder: Path, name: str, settings: ViTSettings, images: Tensor, labels: Tensor, augment: Augment
) -> Path:
    """The folder of a ViT inside `folder`; it is trained first if it is missing.

    Args:
        name: of the data, for the folder's name.
        images: (N, C, S, S) uint8, or float in [-1, 1].
        labels: (N,) int64; read by the objective "labels" alone.
        augment: makes the views.
    """
    target = folder / f"{name}-{settings.objective}-{digest(settings, 8)}"
    if not (target / "config.json").is_file():
        logger.info("training a ViT by %s for %d steps", settings.objective, settings.steps)
        vit = train_vit(settings, images, labels, augment)
        save_model(target, [vit], {"image_mean": [0.5], "image_std": [0.5], "do_normalize": True})
    return target


def train_vit(settings: ViTSettings, images: Tensor, labels: Tensor, augment: Augment) -> Dinov2Model:
    """Train on all images. Leaves the global random state as it was."""
    from transformers import Dinov2Config, Dinov2Model

    shape = ("image_size", "num_channels", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "initializer_range")  # fmt: skip
    config = Dinov2Config(**{name: getattr(settings, name) for name in shape})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        vit = Dinov2Model(config).to(device)
        if settings.objective == "untrained":
            return vit.eval()
        classes = int(labels.max()) + 1
        task = OBJECTIVES[settings.objective](vit, settings, classes).to(device)
        fit(task, settings, images, labels, augment, device)
    return vit.cpu().eval()


def fit(
    task: nn.Module, settings: ViTSettings, images: Tensor, labels: Tensor, augment: Augment, device: torch.device
) -> None:
    """AdamW with one learning-rate cycle."""
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=settings.warmup
    )
    order = BatchOrder(len(images), settings.batch_size, settings.seed)
    bar = progress_bar(range(settings.steps), desc=settings.objective, unit="step")
    for step in bar:
        batch = order.batch(step)
        loss = task(to_floats(images[batch]), labels[batch].to(device), lambda views: augment(views).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == settings.steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def to_floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


# ---- objectives: task(images, labels, augment) is the loss of a batch ----


class ByLabels(nn.Module):
    def __init__(self, vit: Dinov2Model, settings: ViTSettings, classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(2 * settings.hidden_size, classes)

    def forward(self, images: Tensor, labels: Tensor, augment: Augment) -> Tensor:
        return F.cross_entropy(self.head(summary(self.vit(augment(images)).last_hidden_state)), labels)


class ByMasking(nn.Module):
    def __init__(self, vit: Dinov2Model, settings: ViTSettings, classes: int) -> None:
        super().__init__()
        self.vit, self.settings = vit, settings
        self.head = nn.Linear(settings.hidden_size, settings.num_channels * settings.patch_size**2)

    def forward(self, images: Tensor, labels: Tensor, augment: Augment) -> Tensor:
        """Mean squared error over the hidden patches, of which each image has the same number."""
        views = augment(images)
        patches = F.unfold(views, self.settings.patch_size, stride=self.settings.patch_size).mT
        count = patches.shape[1]
        order = torch.rand(len(views), count, device=views.device).argsort(dim=1)
        hidden = order < round(self.settings.masked * count)
        tokens = self.vit(views, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        return F.mse_loss(self.head(tokens[hidden]), patches[hidden])


class ByDistillation(nn.Module):
    def __init__(self, vit: Dinov2Model, settings: ViTSettings, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(2 * settings.hidden_size, PROTOTYPES, bias=False))
        self.average = copy.deepcopy(nn.ModuleList([self.vit, self.head])).requires_grad_(False)
        self.register_buffer("center", torch.zeros(PROTOTYPES))

    def forward(self, images: Tensor, labels: Tensor, augment: Augment) -> Tensor:
        views = torch.cat([augment(images), augment(images)])
        logits = self.head(F.normalize(summary(self.vit(views).last_hidden_state), dim=-1))
        with torch.no_grad():
            own = [parameter for part in (self.vit, self.head) for parameter in part.parameters()]
            lerp_all_(list(self.average.parameters()), own, 1 - MOMENTUM)
            vit, head = self.average
            targets = head(F.normalize(summary(vit(views).last_hidden_state), dim=-1))
            probabilities = ((targets - self.center) / TEACHER_TEMPERATURE).softmax(dim=-1)
            self.center.lerp_(targets.mean(dim=0), 1 - CENTER_MOMENTUM)
        return F.cross_entropy(logits / STUDENT_TEMPERATURE, probabilities.roll(len(images), dims=0))


OBJECTIVES = {"labels": ByLabels, "masked": ByMasking, "distilled": ByDistillation}


def summary(tokens: Tensor) -> Tensor:
    """Tokens (B, 1 + N, D) to the class token beside the mean of the patches, (B, 2·D)."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


# ---- how good a ViT is ----


@torch.no_grad()
def probe_accuracy(folder: Path, images: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Accuracy on held-out images of a linear map from the ViT's features to the classes, fitted by ridge regression.

    Args:
        images, held_out: as for `prepare_vit`. labels, answers: their classes.
    """
    from transformers import Dinov2Model

    vit = Dinov2Model.from_pretrained(folder).eval()

    def features(pixels: Tensor) -> Tensor:
        parts = [summary(vit(to_floats(part)).last_hidden_state) for part in pixels.split(256)]
        return torch.cat(parts).double()

    known, unknown = features(images), features(held_out)
    mean, std = known.mean(dim=0), known.std(dim=0).clamp_min(1e-6)
    known, unknown = (F.pad((values - mean) / std, (0, 1), value=1.0) for values in (known, unknown))
    gram = known.T @ known + 1e-2 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, known.T @ F.one_hot(labels).double())
    return float(((unknown @ weights).argmax(dim=1) == answers).double().mean())


def kl_from_uniform(q: Tensor, k: Tensor, prefix: int) -> float:
    """KL(map ‖ uniform): against the map of keys that are all alike."""
    loss = haste_ext.attn_align_loss(
        q, torch.zeros_like(k), q, k, student_prefix=prefix, teacher_prefix=prefix, divergence="kl"
    )
    return float(loss)
