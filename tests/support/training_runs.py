"""What a training run has left: its log, and its last checkpoint, compared bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.trainer import Trainer, train


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


def assert_a_killed_run_is_the_unbroken_one(make_config, monkeypatch, stop):
    """Bit for bit, with its log: a run that is killed before step `stop`, and started again."""
    unbroken = train(make_config(exp_name="unbroken"))
    with monkeypatch.context() as patch:
        original = Trainer._train_step
        patch.setattr(Trainer, "_train_step", lambda self: original(self) if self.step < stop else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_config())
    torch.manual_seed(999)
    result = train(make_config())
    assert_same_bits(final_state(result), final_state(unbroken))
    assert [line["loss"] for line in read_log(result.folder)] == [line["loss"] for line in read_log(unbroken.folder)]
