"""Two processes draw what one draws, and what a kill leaves is gone on from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from digits_run import write_run
from drawn_images import read_npz
from haste.distributed import Processes
from haste.generation.config import SampleConfig as Args
from haste.generation.sample_dir import deal, sample_to_folder

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
]  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("exps"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the environment of `start` says: other numbers of threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(launcher: list[str], run: Path, folder: Path, steps: int, *flags: str) -> subprocess.Popen:
    words = [sys.executable, *launcher, "haste", "sample", "--ckpt", str(run), "--sample-dir", str(folder)]
    words += ["--num-fid-samples", str(COUNT), "--per-proc-batch-size", "2", "--num-steps", str(steps), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out, err


def kill_in_the_middle(process: subprocess.Popen, folder: Path) -> dict[str, int]:
    """Kill a command and its workers once a few images are there; these, with the times of their writing."""
    deadline = time.monotonic() + 100
    while len(list(folder.glob("*.png"))) < 3:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # all at once, or a launcher would end its workers gently
        member.suspend()
    kept = written(folder)
    for member in family:
        member.kill()
    process.communicate()
    return kept


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_two_processes_that_were_killed_go_on_and_equal_one_byte_for_byte(tmp_path, run, one_thread):
    steps = 120  # so many that a kill finds some of the images missing
    two, one = (tmp_path / name / f"0000004-euler-{steps}-cfg1-seed0" for name in ("two", "one"))
    kept = kill_in_the_middle(start(TORCHRUN, run, tmp_path / "two", steps), two)
    assert 3 <= len(kept) < COUNT and not two.with_name(two.name + ".npz").exists()

    out, _ = finish(start(ACCELERATE, run, tmp_path / "two", steps))
    assert out.count(f"{COUNT} images at") == 1  # one process tells
    assert kept.items() <= written(two).items()
    settings = {"num_fid_samples": COUNT, "per_proc_batch_size": 2, "num_steps": steps}
    sample_to_folder(Args(ckpt=run, sample_dir=tmp_path / "one", **settings))
    for number in range(COUNT):
        assert (two / f"{number:06d}.png").read_bytes() == (one / f"{number:06d}.png").read_bytes()
    (images, labels), (again, same) = (read_npz(folder.with_name(folder.name + ".npz")) for folder in (one, two))
    assert (images == again).all() and (labels == same).all()


def test_of_several_processes_one_says_what_is_wrong(tmp_path, run):
    folder = tmp_path / "0000004-euler-2-cfg1-seed0"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    process = start(TORCHRUN, run, tmp_path, 2)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("haste sample: ") == 1
    assert "--sample-dir must be a new folder" in err and str(folder) in err


def test_batches_are_the_same_whatever_is_there_already():
    assert deal(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert deal([1, 3, 4, 5, 6], 3) == [[1], [3, 4, 5], [6]]
    assert deal([], 3) == []


def test_a_process_alone_agrees_with_itself():
    processes = Processes()
    assert (processes.rank, processes.count, processes.first) == (0, 1, True)
    assert processes.agree(lambda: 3) == 3 and processes.gather("x") == ["x"]
    processes.leave()
