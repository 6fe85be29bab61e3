"""Folders of runs as the trainer and `haste evaluate` leave them, without the training and the measuring."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from haste.data.images import write_image
from haste.training.config import TrainConfig


def write_log(folder, name, stop, steps=40, **settings):
    """A run's folder as the trainer leaves it, without the training."""
    run = folder / name
    run.mkdir()
    config = {**asdict(TrainConfig.from_preset("digits")), "exp_name": name, **settings}
    (run / "args.json").write_text(json.dumps(config))
    with open(run / "log.jsonl", "w") as file:
        for step in range(1, steps + 1):
            aligned = stop is None or step <= stop
            line = {
                "step": step, "total_loss": 1.0, "loss": 1 / step, "proj_loss": -0.5 if aligned else None,
                "attn_loss": None, "grad_norm": 2.0, "skipped_steps": int(step == 3), "aligned": aligned,
                "images_per_second": 100.0 if aligned else 150.0, "teraflops": 0.25, "mfu": None,
                "peak_memory_gib": 1.5,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    for step in (10, 20, 30, 40):
        write_image(run / "samples" / f"{step:07d}.png", np.full((8, 8, 3), step, np.uint8))
    return run


def digits_record(step, **changes):
    """A line of evaluation.jsonl."""
    sampling = {"num_steps": 25, "mode": "ode", "cfg_scale": 1.0, "labels": "balanced", "cache": "none"}
    return {"step": step, "checkpoint": f"{step:07d}.pt", "samples": 700, **sampling, "evaluated_by": "abc", "fd": 3.0,
            "label_accuracy": 0.9, "seconds": 1.0, **changes}  # fmt: skip
