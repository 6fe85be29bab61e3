"""The teacher of the digits preset: a small DINOv2-shaped ViT that learns to read the same digits first.

It is saved by save_pretrained() and loaded by the path that loads any other teacher. Its training does not count as
the model's: it happens once, in seconds, and is kept beside the runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2ForImageClassification

from haste.data.loader import BatchOrder
from haste.digits import load_digits
from haste.distributed import progress_bar
from haste.errors import UserError, in_one_line
from haste.io import remove_abandoned, temporary_path, writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherConfig:
    """The shape of the ViT and how it is trained. 4 x 4 tokens of 2 x 2 pixels, as the model of the preset has."""

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


def prepare(folder: Path, settings: TeacherConfig | None = None) -> Path:
    """The teacher's folder inside `folder`, trained first if missing; a digest of the settings is in its name."""
    settings = settings or TeacherConfig()
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:8]
    target = folder / f"digits-vit-{digest}"
    if not (target / "config.json").is_file():
        logger.info("training the teacher, a ViT that reads the digits, for %d steps", settings.steps)
        _save(train_teacher(settings), target)
    return target


def shape() -> tuple[str, int, int, int, int]:
    """Model type, width, depth, pixels per patch and per image."""
    settings = TeacherConfig()
    return ("dinov2", settings.hidden_size, settings.num_hidden_layers, settings.patch_size, 8)


def train_teacher(settings: TeacherConfig) -> Dinov2ForImageClassification:
    """Train the classifier on shifted, noisy digits. Leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        images, labels = load_digits()
        model = _build(settings)
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
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == settings.steps - 1:
                accuracy = (logits.argmax(-1) == labels[batch]).float().mean()
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.2f}", refresh=False)
    return model.eval()


def _build(settings: TeacherConfig) -> Dinov2ForImageClassification:
    config = Dinov2Config(
        image_size=8,
        patch_size=settings.patch_size,
        num_channels=1,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        mlp_ratio=settings.mlp_ratio,
        initializer_range=settings.initializer_range,
        num_labels=10,
    )
    return Dinov2ForImageClassification(config)


def augment(images: torch.Tensor, noise: float) -> torch.Tensor:
    """Shift each image (B, C, S, S) by up to one pixel each way, over paper (-1), and add Gaussian noise."""
    batch, _, size, _ = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2, batch))
    rows = top[:, None] + torch.arange(size)
    columns = left[:, None] + torch.arange(size)
    shifted = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    shifted = shifted.permute(0, 3, 1, 2)
    return shifted + noise * torch.randn_like(shifted)


def _save(model: Dinov2ForImageClassification, target: Path) -> None:
    """Write the folder under another name first: a kill leaves no half teacher behind."""
    remove_abandoned(target)
    temporary = temporary_path(target)
    settings = {"image_mean": [0.5], "image_std": [0.5], "do_normalize": True}
    try:
        with writing(str(target)):
            model.dinov2.save_pretrained(temporary)
            (temporary / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
            os.replace(temporary, target)
    except (UserError, SafetensorError) as error:
        if not (target / "config.json").is_file():  # where another process has put the same teacher
            raise UserError(in_one_line(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
