"""A run folder of the digits without the training: checkpoints of a small xAR with random weights, four cells."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from haste.io import save_tensors
from haste.models import XAR, build_model
from haste.training.checkpoint import checkpoint_path
from haste.training.config import TrainConfig

SHAPE = {
    "family": "xar", "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "channels": 1, "grid": 4,
    "patch_size": 2, "entity": "cell", "entity_size": 2, "num_classes": 10,
}  # fmt: skip


def write_xar_run(output_dir: Path, step: int = 4, **shape) -> Path:
    """Write <output_dir>/run with one checkpoint, trained weights unlike the averaged; returns its path."""
    config: TrainConfig = TrainConfig.from_preset("xar-digits", output_dir=str(output_dir), exp_name="run")
    config_of_model = {**SHAPE, "class_dropout_prob": config.cfg_prob, **shape}
    trained, averaged = (random_xar(config_of_model, seed) for seed in (step, 1000 + step))
    checkpoint = {
        "model": trained.state_dict(),
        "ema": averaged.state_dict(),
        "opt": {},
        "args": config.to_namespace(),
        "steps": step,
        "model_config": config_of_model,
    }
    run = output_dir / "run"
    save_tensors(checkpoint_path(run / "checkpoints", step), checkpoint)
    (run / "args.json").write_text(json.dumps(asdict(config)))
    return run


def random_xar(config: dict, seed: int) -> XAR:
    """Weights of a size at which labels, times and places all matter."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
