"""The folder of samples: what it refuses and resumes, and two processes that fill it as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_run import write_run
from drawn_images import read_npz
from forked_haste import start_ranks
from haste.distributed import Processes
from haste.errors import UserError
from haste.generation.config import SampleConfig as Args
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler
from haste.generation.sample_dir import SampleDir, Samples, deal, read_record, sample_to_folder, settle_full_steps
from image_files import cut_short

SETTINGS = {"checkpoint": "0000002.pt", "num_steps": 4, "labels": "random"}
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_nothing_is_written_before_the_first_image(tmp_path):
    folder = SampleDir(tmp_path / "new", SETTINGS)
    assert folder.missing(3) == [0, 1, 2] and list(tmp_path.iterdir()) == []


def test_a_second_start_draws_what_is_missing_and_adds_up_the_seconds(tmp_path):
    first = SampleDir(tmp_path / "s", SETTINGS)
    first.write([0, 1, 2], IMAGES[:3])
    first.count(3, seconds=1.5, calls=4, full=2)
    (first.path / "000001.png").unlink()

    second = SampleDir(tmp_path / "s", SETTINGS)
    assert second.missing(6) == [1, 3, 4, 5]
    second.write([1, 3, 4, 5], IMAGES[[1, 3, 4, 5]])
    second.count(4, seconds=0.5, calls=4, full=2)
    assert second.sampled.images == 7 and second.sampled.seconds == 2.0 and second.sampled.images_per_second == 3.5
    assert (second.sampled.calls_per_image, second.sampled.full_per_image) == (4, 2)

    labels = np.arange(6)
    second.collect(labels)
    images, saved = read_npz(tmp_path / "s.npz")
    assert (images == IMAGES).all() and (saved == labels).all()
    assert (Samples(labels, second, new=4).images == IMAGES).all()


def test_fewer_images_than_there_are_can_be_collected(tmp_path):
    folder = SampleDir(tmp_path / "s", SETTINGS)
    folder.write(range(6), IMAGES)
    folder.collect(np.zeros(2))
    assert (read_npz(folder.npz)[0] == IMAGES[:2]).all()


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    folder = SampleDir(tmp_path / "s", SETTINGS)
    folder.write(range(3), IMAGES[:3])
    cut_short(folder.path / "000001.png")
    with pytest.raises(UserError, match="^[^:]*000001.png .*; remove it and run the command again$"):
        folder.collect(np.zeros(3))
    assert not folder.npz.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = SampleDir(tmp_path / "s", SETTINGS)
    folder.write([0], IMAGES[:1])
    (folder.path / "000001.png").mkdir()  # what no rename replaces, whoever runs this
    with pytest.raises(UserError, match="--sample-dir .* cannot be written"):
        folder.write([1], IMAGES[1:2])
    folder.npz.mkdir()
    with pytest.raises(UserError, match="s.npz cannot be written: .*; the images are complete"):
        folder.collect(np.zeros(1))


def test_a_folder_of_another_command_is_refused_with_what_differs(tmp_path):
    SampleDir(tmp_path / "s", SETTINGS).write([0], IMAGES[:1])
    with pytest.raises(UserError, match="--sample-dir must be another .* with num_steps 4, not 5$"):
        SampleDir(tmp_path / "s", {**SETTINGS, "num_steps": 5})
    with pytest.raises(UserError, match="interval unset, not 3"):
        SampleDir(tmp_path / "s", {**SETTINGS, "interval": 3})
    with pytest.raises(UserError, match="labels random, not 1,2,3,.{0,40}[.][.][.]$"):
        SampleDir(tmp_path / "s", {**SETTINGS, "labels": "1,2,3," * 1000})
    assert read_record(tmp_path / "s").settings == SETTINGS


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--sample-dir must be a new folder"):
        SampleDir(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="--sample-dir must be a new folder"):
        SampleDir(tmp_path / "notes.txt", SETTINGS)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_kill_of_the_first_write_leaves_is_no_other_folder_and_goes_away(tmp_path):
    for name in ("s/.sample.json.12.tmp", "s/.lock", ".s.npz.12.tmp", ".s-grid.png.12.tmp", ".other.npz.12.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    folder = SampleDir(tmp_path / "s", SETTINGS)
    with folder.hold():
        folder.write([0], IMAGES[:1])
        with pytest.raises(UserError, match="s is in use by .*; choose another --sample-dir"):
            with SampleDir(tmp_path / "s", SETTINGS).hold():
                pytest.fail("held twice")
    assert sorted(path.name for path in folder.path.iterdir()) == ["000000.png", "sample.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.npz.12.tmp", "s"]


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    folder = SampleDir(tmp_path / "s", {**SETTINGS, "error_threshold": 0.1})
    folder.write([0], IMAGES[:1])
    drawn = {"pictures": 1, "seconds": 2.0, "evaluations_per_picture": 4, "full_per_picture": 3}
    folder.record.write_text(json.dumps({"settings": {**SETTINGS, "max_error": 0.1}, "drawn": drawn}))
    again = SampleDir(tmp_path / "s", {**SETTINGS, "error_threshold": 0.1})
    assert (again.sampled.images, again.sampled.calls_per_image, again.sampled.full_per_image) == (1, 4, 3)


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(UserError, match="sample.json must "):
        SampleDir(tmp_path, SETTINGS)


ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "haste",
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


def words(run: Path, folder: Path, steps: int) -> list[str]:
    flags = ["--num-fid-samples", str(COUNT), "--per-proc-batch-size", "2", "--num-steps", str(steps)]
    return ["sample", "--ckpt", str(run), "--sample-dir", str(folder), *flags]


def outputs(folder: Path) -> list[Path]:
    return [folder.with_name(f"rank{rank}.txt") for rank in range(2)]


def kill_in_the_middle(ranks: list[Process], folder: Path, printed: Path) -> dict[str, int]:
    """Kill processes that work together once a few images are there; these, with the times of their writing."""
    deadline = time.monotonic() + 100
    while len(list(folder.glob("*.png"))) < 3:
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline, printed.read_text()[-3000:]
        time.sleep(0.01)
    for rank in ranks:  # all at once: none ends by the other's death
        os.kill(rank.pid, signal.SIGSTOP)
    kept = written(folder)
    for rank in ranks:
        rank.kill()
        rank.join()
    return kept


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_two_processes_that_were_killed_go_on_and_equal_one_byte_for_byte(tmp_path, run, one_thread):
    steps = 120  # so many that a kill finds some of the images missing
    two, one = (tmp_path / name / f"0000004-euler-{steps}-cfg1-seed0" for name in ("two", "one"))
    first, second = outputs(tmp_path / "two")
    kept = kill_in_the_middle(start_ranks(words(run, tmp_path / "two", steps), [first, second]), two, first)
    assert 3 <= len(kept) < COUNT and not two.with_name(two.name + ".npz").exists()

    done = subprocess.run([*ACCELERATE, *words(run, tmp_path / "two", steps)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{COUNT} images at") == 1  # one process tells
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
    printed = outputs(tmp_path / "out")
    for rank in start_ranks(words(run, tmp_path, 2), printed):
        rank.join(timeout=120)
        assert rank.exitcode not in (0, None)
    err = "".join(path.read_text() for path in printed)
    assert err.count("haste sample: ") == 1
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


def test_of_several_processes_one_measures_the_full_steps_for_all(tmp_path, run, monkeypatch):
    """On images 0 to 7, whichever images a process samples itself."""

    class Second(Processes):
        def agree(self, function):
            return [0, 2, 3]  # what the first process found

    loaded = load_checkpoint(run)
    sampler = Sampler(loaded, SamplingConfig(num_steps=6, cache="newton", order=1, error_threshold=0.1))
    folder = SampleDir(tmp_path / "s", {})
    settled = settle_full_steps(sampler, folder, Second())
    assert settled.settings.full_step_list == folder.full_steps == [0, 2, 3]
    settled.sample([11])
    assert settled.cache.full_steps == [0, 2, 3]

    asked, start_of = [], Sampler.start_of
    monkeypatch.setattr(
        Sampler, "start_of", lambda self, indices: asked.append(list(indices)) or start_of(self, indices)
    )
    assert settle_full_steps(sampler, SampleDir(tmp_path / "t", {}), Processes()).settings.full_step_list[0] == 0
    assert asked == [list(range(8))]


def test_a_missing_package_is_named_before_anything_is_sampled(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'haste\[plot\]'"):
        sample_to_folder(Args(ckpt=run, sample_dir=tmp_path, num_fid_samples=2, num_steps=2))
    assert list(tmp_path.iterdir()) == []
