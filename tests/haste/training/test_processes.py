"""Two processes do what one does, by DDP and, through accelerate's launcher, by FSDP2; and they stop together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.models import SiT
from haste.training.checkpoint import checkpoint_path, list_checkpoints
from training_processes import LAUNCHER, assert_same_run, last, outputs, read_log

STEPS = 10
SETTINGS = [
    "train", "--preset", "digits", "--exp-name", "run", "--layer-map", "0:1,1:2", "--batch-size", "4",
    "--gradient-accumulation-steps", "2", "--early-stop-point", "6", "--logging-steps", "1",
    "--checkpointing-steps", "4", "--evaluation-steps", "5", "--evaluation-samples", "21",
    "--evaluation-reference", "digits",
]  # fmt: skip


def words(folder: Path, teacher: Path, steps: int = STEPS) -> list[str]:
    return [*SETTINGS, "--output-dir", str(folder), "--enc-type", str(teacher), "--max-train-steps", str(steps),
            "--evaluation-features", str(teacher)]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, teacher_folder) -> Path:
    folder = tmp_path_factory.mktemp("one")
    main(words(folder, teacher_folder))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def test_a_copy_each_equals_one_process(tmp_path, teacher_folder, one_process):
    ranks = start_ranks(words(tmp_path, teacher_folder), outputs(tmp_path))
    for rank, output in zip(ranks, outputs(tmp_path), strict=True):
        finish(rank, output)
    assert_same_run(tmp_path, one_process)


def test_a_share_each_goes_on_from_one_process_and_equals_it(tmp_path, teacher_folder, one_process):
    shutil.copytree(one_process, tmp_path, dirs_exist_ok=True)
    for step in (8, 10):
        checkpoint_path(tmp_path / "run" / "checkpoints", step).unlink()
    done = subprocess.run([*LAUNCHER, *words(tmp_path, teacher_folder)], capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]  # from step 4 on, over the end of alignment
    assert_same_run(tmp_path, one_process)
    saved = last(tmp_path)
    student = SiT(**saved["model_config"], z_dims=(16,))
    student.load_state_dict(saved["model"], strict=True)
    shapes = [tuple(parameter.shape) for parameter in student.parameters()]
    for number, state in saved["opt"]["state"].items():
        assert tuple(state["exp_avg"].shape) == shapes[number]


def test_two_processes_stop_after_the_same_step_and_save_it(tmp_path, teacher_folder):
    ranks = start_ranks(words(tmp_path, teacher_folder, 100_000), outputs(tmp_path))
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and len(log.read_text().splitlines()) >= 5):
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline, outputs(tmp_path)[0].read_text()
        time.sleep(0.05)
    for rank in reversed(ranks):
        rank.terminate()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 128 + signal.SIGTERM
    errors = outputs(tmp_path)[0].read_text()
    step = int(list_checkpoints(tmp_path / "run" / "checkpoints")[-1].stem)
    assert f"stopped by SIGTERM after step {step}, which is saved" in errors
    assert read_log(tmp_path)[-1]["step"] == step
    assert last(tmp_path, step)["steps"] == step
