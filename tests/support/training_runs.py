"""What a training run has left: its log, and its last checkpoint, compared bit by bit."""

from __future__ import annotations

import json

import torch
from haste.training.checkpoint import checkpoint_path, read_checkpoint


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(a, b, where="checkpoint"):
    """Equal in every tensor and value, however deep."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}.{index}")
    else:
        assert a == b, where


def final_state(result):
    """The last checkpoint, without the settings that may change from one start to the next."""
    checkpoint = read_checkpoint(checkpoint_path(result.folder / "checkpoints", result.step))
    del checkpoint["args"]
    return checkpoint
