"""Training runs of several processes, and one beside another, in a folder each with the run "run"."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from haste.training.checkpoint import checkpoint_path, list_checkpoints, read_checkpoint

LAUNCHER = [
    sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
    "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0", "-m", "haste",
]  # fmt: skip


def outputs(folder: Path) -> list[Path]:
    return [folder / "rank0.txt", folder / "rank1.txt"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def last(folder: Path, step: int | None = None) -> dict:
    """The newest checkpoint, or that of a step."""
    checkpoints = folder / "run" / "checkpoints"
    return read_checkpoint(list_checkpoints(checkpoints)[-1] if step is None else checkpoint_path(checkpoints, step))


def assert_same_run(folder: Path, other: Path) -> None:
    """The same images, noise and steps; sums are taken in another order, which Adam's first steps enlarge."""
    for a, b in zip(read_log(folder), read_log(other), strict=True):
        assert (a["step"], a["aligned"]) == (b["step"], b["aligned"])
        for name in ("loss", "proj_loss", "attn_loss", "grad_norm"):
            assert a[name] == (None if b[name] is None else pytest.approx(b[name], rel=2e-3)), (a["step"], name)
        assert ("fd" in a) == ("fd" in b) and a.get("fd", 0.0) == pytest.approx(b.get("fd", 0.0), rel=2e-2)
    a, b = last(folder), last(other)
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert list(a["ema"]) == list(b["ema"])
    for name in a["ema"]:
        torch.testing.assert_close(a["ema"][name], b["ema"][name], rtol=1e-2, atol=1e-3)
