"""A run folder of the digits without the training: checkpoints of a small SiT or DiT with random weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from haste.io import save_tensors
from haste.models import DiT, SiT
from haste.training.checkpoint import checkpoint_path
from haste.training.config import TrainConfig

SHAPE = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def write_run(output_dir: Path, steps: tuple[int, ...] = (2, 4), preset: str = "digits", **settings) -> Path:
    """Write <output_dir>/run with one checkpoint per step, trained weights unlike the averaged; returns its path."""
    config: TrainConfig = TrainConfig.from_preset(preset, output_dir=str(output_dir), exp_name="run", **settings)
    run, module = output_dir / "run", DiT if preset == "dit-digits" else SiT
    for step in steps:
        trained, averaged = (random_student(seed, config.cfg_prob, module) for seed in (step, 1000 + step))
        checkpoint = {
            "model": trained.state_dict(),
            "ema": averaged.state_dict(),
            "opt": {},
            "args": config.to_namespace(),
            "steps": step,
            "model_config": {"family": module.family, **SHAPE, "class_dropout_prob": config.cfg_prob},
        }
        save_tensors(checkpoint_path(run / "checkpoints", step), checkpoint)
    (run / "args.json").write_text(json.dumps(asdict(config)))
    losses = {"total_loss": 2.0, "loss": 1.0, "proj_loss": -0.5, "attn_loss": 2.5}
    stopped = {"total_loss": 1.0, "loss": 1.0, "proj_loss": None, "attn_loss": None}
    log = [{"step": 1, **losses, "aligned": True}, {"step": 2, **losses, "aligned": True}]
    log += [{"step": 3, **stopped, "aligned": False}, {"step": 4, **stopped, "aligned": False}]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return run


def random_student(seed: int, class_dropout_prob: float = 0.1, module: type[SiT] = SiT) -> SiT:
    """Weights of a size at which labels, times and positions all matter; a fresh SiT draws nothing but its noise."""
    generator = torch.Generator().manual_seed(seed)
    model = module(**SHAPE, class_dropout_prob=class_dropout_prob)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
