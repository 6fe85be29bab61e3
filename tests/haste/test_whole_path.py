"""`haste train` as a process of its own: killed at any moment, stopped politely, started again."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from forked_haste import finish, start_haste
from haste.training.checkpoint import list_checkpoints, read_checkpoint
from small_models import save_teacher

STEPS = 32
OUTPUT = "output.txt"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def start(folder: Path, teacher: Path, *extra: str) -> multiprocessing.Process:
    words = [
        "train", "--preset", "digits", "--output-dir", str(folder), "--exp-name", "run",
        "--model", "SiT-Digits/2", "--enc-type", str(teacher), "--layer-map", "0:1,1:2",
        "--batch-size", "8", "--early-stop-point", "16", "--max-train-steps", str(STEPS),
        "--logging-steps", "1", "--checkpointing-steps", "4", *extra,
    ]  # fmt: skip
    return start_haste(words, folder / OUTPUT)


def wait_for_step(folder: Path, step: int, process: multiprocessing.Process) -> None:
    log = folder / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.is_alive():
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {(folder / OUTPUT).read_text()}")


def last_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(output_dir / "run" / "checkpoints" / f"{STEPS:07d}.pt")
    return {f"{part}.{name}": value for part in ("model", "ema") for name, value in checkpoint[part].items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(folder, teacher), folder / OUTPUT)
    return last_weights(folder)


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path, teacher, unbroken):
    seed = random.SystemRandom().randrange(2**32)
    moment = random.Random(seed)
    for reached in (5, 18):  # while aligned, and after τ
        process = start(tmp_path, teacher)
        wait_for_step(tmp_path, reached + moment.randrange(8), process)
        time.sleep(moment.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(start(tmp_path, teacher), tmp_path / OUTPUT)
    weights = last_weights(tmp_path)
    assert weights.keys() == unbroken.keys()
    different = [name for name in weights if not torch.equal(weights[name], unbroken[name])]
    assert different == [], f"seed {seed}"
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, STEPS + 1))


def test_sigterm_saves_says_so_and_the_same_command_goes_on(tmp_path, teacher, unbroken):
    process = start(tmp_path, teacher, "--checkpointing-steps", "1000")
    wait_for_step(tmp_path, 10, process)
    process.terminate()
    process.join(timeout=300)
    assert process.exitcode == 128 + signal.SIGTERM
    errors = (tmp_path / OUTPUT).read_text()
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    step = int(saved[-1].stem)
    assert len(saved) == 1 and 10 <= step < STEPS
    assert f"stopped by SIGTERM after step {step}, which is saved" in errors
    assert "Traceback" not in errors
    assert f"resumed from step {step}" in finish(start(tmp_path, teacher), tmp_path / OUTPUT)
    weights = last_weights(tmp_path)
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)
