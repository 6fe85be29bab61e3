"""A run folder of MM-DiT on captioned images, without the training: small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from haste.io import save_tensors
from haste.models import build_model
from haste.training.checkpoint import checkpoint_path
from haste.training.config import TrainConfig
from text_files import CAPTIONS, TOKENS, WIDTH, save_text_encoder

SHAPE = {
    "family": "mmdit", "depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8,
    "in_channels": 1, "context_tokens": TOKENS, "context_width": WIDTH, "encoder_depth": 2,
}  # fmt: skip


def write_text_run(output_dir: Path, steps: tuple[int, ...] = (4,), null: bool = True, **changes: Any) -> Path:
    """Write <output_dir>/run with one checkpoint per step, whose encoder is in <output_dir>/clip; returns its path.

    Args:
        null: whether it records the features of the empty caption.
        changes: of the checkpoints' content.
    """
    encoder = output_dir / "clip"
    if not encoder.is_dir():
        save_text_encoder(encoder)
    config: TrainConfig = TrainConfig(output_dir=str(output_dir), exp_name="run", data_dir="captions", resolution=8)
    for step in steps:
        weights = random_weights(step)
        content = {
            "model": weights,
            "ema": weights,
            "opt": {},
            "args": config.to_namespace(),
            "steps": step,
            "model_config": dict(SHAPE),
            "latents": None,
            "text": {"encoder": str(encoder), "tokens": TOKENS, "width": WIDTH},
            "null": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(7)) if null else None,
            "captions": list(CAPTIONS),
        }
        save_tensors(checkpoint_path(output_dir / "run" / "checkpoints", step), {**content, **changes})
    return output_dir / "run"


def write_public(path: Path) -> Path:
    """A checkpoint as REPA's trainer leaves it: no config, no captions, no null condition."""
    weights = random_weights(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights, "ema": weights, "opt": {}, "steps": 0}, path)
    return path


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Of a size at which texts, times and positions all matter, texts above all."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.context_embedder.weight *= 4
    return model.state_dict()
