"""`haste prepare` on real photographs and a tiny random VAE: what it writes, what it refuses, how it goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.data import BatchOrder, batches, load_dataset
from haste.data.images import center_crop
from haste.data.prepare import Destination, Preparation
from haste.resumable import hold
from haste.vae import VAE, LatentFormat
from image_files import cut_short, pixels_of, save_vae, write_classes
from PIL import Image


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "source")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepare(source: Path, dest: Path, vae: object, *flags: str) -> None:
    common = ("--resolution", "8", "--batch-size", "5", "--num-workers", "0")
    main(["prepare", "--source", str(source), "--dest", str(dest), "--vae", str(vae), *common, *flags])


def refusal(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        prepare(*arguments)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste prepare:")]
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(one: Path, two: Path) -> None:
    """Moments may differ in their last digits: how a batch is cut up decides how convolutions round."""
    a, b = contents(one), contents(two)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".npy"):
            np.testing.assert_allclose(np.load(one / name), np.load(two / name), rtol=1e-4, atol=1e-5)
        elif name.endswith(".pt"):
            torch.testing.assert_close(*(torch.load(each / name, weights_only=True) for each in (one, two)))
        else:
            assert a[name] == b[name], name


def test_images_and_latents_in_repas_layout(source, tmp_path, vae, capsys):
    prepare(source, tmp_path / "out", vae)
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is ready for haste train --data-dir\n"
    originals = sorted(source.rglob("*.png"))
    encoder = VAE(LatentFormat.of(str(vae)))
    for index, original in enumerate(originals):
        pixels = pixels_of(Image.open(tmp_path / f"out/images/00000/img{index:08d}.png"))
        assert (pixels == center_crop(Image.open(original).convert("RGB"), 8)).all()
        moments = np.load(tmp_path / f"out/vae-sd/00000/img-mean-std-{index:08d}.npy")
        expected = encoder.encode(torch.tensor(pixels.copy())[None] / 127.5 - 1)[0].numpy()
        np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    labels = [["ant", "bee", "cat"].index(original.parent.name) for original in originals]
    for folder, name in (("images", "img"), ("vae-sd", "img-mean-std-")):
        listed = json.loads((tmp_path / "out" / folder / "dataset.json").read_text())["labels"]
        ending = "png" if folder == "images" else "npy"
        assert listed == [[f"00000/{name}{index:08d}.{ending}", label] for index, label in enumerate(labels)]


def test_training_reads_back_what_was_prepared(source, tmp_path, vae):
    prepare(source, tmp_path / "out", vae)
    data = load_dataset(str(tmp_path / "out"), 8)
    assert data.latents == LatentFormat.of(str(vae))  # as prepare.json tells
    batch = next(batches(data, BatchOrder(12, 12, seed=0), num_workers=2))
    assert batch.inputs.shape == (12, 4, 2, 2) and batch.images.shape == (12, 3, 8, 8)
    assert sorted(batch.condition.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_the_names_of_classes_come_through(source, tmp_path, vae):
    prepare(source, tmp_path / "dest", vae)
    names = load_dataset(str(tmp_path / "dest"), 8).class_names
    assert names == load_dataset(str(source), 8).class_names == ["ant", "bee", "cat"]


def test_samples_of_a_run_stand_under_the_names_of_its_classes(source, tmp_path, monkeypatch):
    run = ["--data-dir", str(source), "--resolution", "8", "--model", "SiT-S/4", "--enc-type", "None"]
    run += ["--output-dir", str(tmp_path), "--exp-name", "run", "--batch-size", "4", "--max-train-steps", "1"]
    main(["train", *run, "--sampling-steps", "0", "--num-workers", "0", "--mixed-precision", "no"])
    shown = []
    monkeypatch.setattr("haste.plotting.plot_grid", lambda path, images, titles, **_: shown.extend(titles))
    few = ["--num-fid-samples", "3", "--num-steps", "1", "--labels", "balanced"]
    main(["sample", "--ckpt", str(tmp_path / "run"), *few])
    assert shown == ["ant", "bee", "cat"]


def test_without_a_vae_the_images_alone(source, tmp_path):
    prepare(source, tmp_path / "out", "none", "--num-workers", "2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "prepare.json"]
    data = load_dataset(str(tmp_path / "out"), 8)
    assert (len(data), data.channels, data.num_classes, data[11].label) == (12, 3, 3, 2)


@pytest.mark.parametrize(("asked", "started"), [(1024, 3), (2, 2)])
def test_there_are_no_more_workers_than_batches(asked, started, monkeypatch):
    loaders = []
    monkeypatch.setattr("haste.data.prepare.prefetch", lambda loader: loaders.append(loader) or iter(()))
    preparation = Preparation(None, None, 8, None, batch_size=5, num_workers=asked, on_bad_file="refuse")
    assert list(preparation.run(list(range(12)))) == []
    assert [loader.num_workers for loader in loaders] == [started]


def test_zips(source, tmp_path, vae):
    prepare(source, tmp_path / "folders", vae)
    prepare(source, tmp_path / "zips", vae, "--zip")
    assert sorted(path.name for path in (tmp_path / "zips").iterdir()) == [
        "images.zip", "latents_stats.pt", "prepare.json", "vae-sd.zip"]  # fmt: skip
    folders, zips = (load_dataset(str(tmp_path / name), 8) for name in ("folders", "zips"))
    for index in range(12):
        assert all(torch.equal(a, b) for a, b in zip(folders[index], zips[index], strict=True))
    before = contents(tmp_path / "zips")
    prepare(source, tmp_path / "zips", vae, "--zip")
    assert contents(tmp_path / "zips") == before


# ---- mirrored latents ----


def test_mirrored_latents_are_those_of_the_mirror_images(source, tmp_path, vae):
    prepare(source, tmp_path / "out", vae, "--flip", "--latents-dir", "vae-in")
    encoder = VAE(LatentFormat.of(str(vae)))
    for index in range(12):
        pixels = pixels_of(Image.open(tmp_path / f"out/images/00000/img{index:08d}.png"))[:, :, ::-1]
        expected = encoder.encode(torch.tensor(pixels.copy())[None] / 127.5 - 1)[0].numpy()
        moments = np.load(tmp_path / f"out/vae-in-flip/00000/img-mean-std-{index:08d}.npy")
        np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    data = load_dataset(str(tmp_path / "out"), 8, random_flip=True)  # prepare.json tells the folder
    plain, mirrored = data.read(0, 0), data.read(0, 1)
    assert torch.equal(plain.pixels.flip(-1), mirrored.pixels) and not torch.equal(plain.moments, mirrored.moments)


@pytest.mark.parametrize("packed", [False, True])
def test_mirrored_latents_are_added_to_a_finished_folder(source, tmp_path, vae, packed, monkeypatch):
    flags = ["--zip"] * packed
    prepare(source, tmp_path / "at-once", vae, "--flip", *flags)
    prepare(source, tmp_path / "out", vae, *flags)
    before = contents(tmp_path / "out")
    encoded = []
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
    prepare(source, tmp_path / "out", vae, "--flip", *flags)
    assert sum(encoded) == 12  # the mirror images alone
    after = contents(tmp_path / "out")
    assert all(after[name] == data for name, data in before.items() if name != "prepare.json")
    assert after.keys() == contents(tmp_path / "at-once").keys()
    data, same = (load_dataset(str(tmp_path / name), 8, random_flip=True) for name in ("out", "at-once"))
    for index in range(12):
        torch.testing.assert_close(data.read(index, 1), same.read(index, 1), rtol=1e-4, atol=1e-5)
    prepare(source, tmp_path / "out", vae, *flags)  # nothing is left to do, with the flag or without
    prepare(source, tmp_path / "out", vae, "--flip", *flags)
    assert contents(tmp_path / "out") == after and sum(encoded) == 12


def test_a_killed_addition_of_mirrored_latents_goes_on(source, tmp_path, vae, monkeypatch):
    prepare(source, tmp_path / "unbroken", vae, "--flip")
    prepare(source, tmp_path / "out", vae)
    prepare(source, tmp_path / "out", vae, "--flip")
    cut_short(tmp_path / "out/vae-sd-flip/00000/img-mean-std-00000004.npy")
    (tmp_path / "out/vae-sd-flip/00000/img-mean-std-00000007.npy").unlink()
    record = json.loads((tmp_path / "out/prepare.json").read_text())
    (tmp_path / "out/prepare.json").write_text(json.dumps({**record, "finished": False}))
    prepare(source, tmp_path / "out", vae, "--flip")
    assert_same_files(tmp_path / "out", tmp_path / "unbroken")


def test_flags_of_latents_that_do_not_fit(source, tmp_path, vae, capsys):
    for flags, sentence in [
        (("--vae", "none", "--flip"), "--vae must be a VAE with --flip, .* got none"),
        (("--latents-dir", "images"), "--latents-dir must not be images, .* got images"),
        (("--latents-dir", "images.zip"), "--latents-dir must not be .* the name of a file, got images.zip"),
        (("--latents-dir", "x", "--vae", "none"), "--latents-dir must be left out with --vae none, got x"),
        (("--latents-dir", "a/b"), "--latents-dir must be a plain name of a folder"),
        (("--captions", str(source), "--flip"), "--flip must be left out with --captions"),
        (("--captions", str(source), "--latents-dir", "x"), "--latents-dir must be left out with --captions"),
    ]:
        assert re.search(sentence, refusal(capsys, source, tmp_path / "out", vae, *flags))
    prepare(source, tmp_path / "out", vae)
    line = refusal(capsys, source, tmp_path / "out", vae, "--latents-dir", "vae-in")
    assert line.endswith("with latents_dir vae-sd, not vae-in")


# ---- statistics of the latents ----


def test_a_damaged_file_that_was_removed_is_made_again(source, tmp_path, vae, capsys):
    prepare(source, tmp_path / "out", vae)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    damaged = next((tmp_path / "out").glob("vae-sd/*/*.npy"))
    np.save(damaged, np.full_like(np.load(damaged), np.nan))
    (tmp_path / "out" / "latents_stats.pt").unlink()
    assert "remove it, and the same command makes it again" in refusal(capsys, source, tmp_path / "out", vae)
    damaged.unlink()
    prepare(source, tmp_path / "out", vae)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def statistics_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "latents_stats.pt", weights_only=True)


def test_statistics_of_the_channels_are_beside_the_latents(source, tmp_path, vae):
    prepare(source, tmp_path / "out", vae)
    moments = np.stack([np.load(path) for path in sorted((tmp_path / "out").glob("vae-sd/*/*.npy"))]).astype(float)
    means, deviations = np.split(moments, 2, axis=1)
    found, std = statistics_of(tmp_path / "out"), (means.var((0, 2, 3)) + (deviations**2).mean((0, 2, 3))) ** 0.5
    np.testing.assert_allclose(found["mean"].flatten(), means.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["std"].flatten(), std, rtol=1e-6)
    stats = str(tmp_path / "out" / "latents_stats.pt")
    latents = load_dataset(str(tmp_path / "out"), 8, vae_stats=stats).latents
    np.testing.assert_allclose(latents.scale, 1 / std, rtol=1e-6)
    assert load_dataset(str(source), 8, vae=str(vae), vae_stats=stats).latents == latents
    (tmp_path / "out" / "latents_stats.pt").unlink()  # as of a folder that was made before there were any
    prepare(source, tmp_path / "out", vae)
    assert all(torch.equal(value, found[name]) for name, value in statistics_of(tmp_path / "out").items())


def test_several_processes_come_to_the_same_statistics(source, tmp_path, vae, monkeypatch):
    outputs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    flags = ["--vae", str(vae), "--resolution", "8", "--num-workers", "0", "--dest", str(tmp_path / "two")]
    ranks = start_ranks(["prepare", "--source", str(source), *flags], outputs)
    for rank, output in zip(ranks, outputs, strict=True):
        finish(rank, output)
    before = (tmp_path / "two" / "latents_stats.pt").read_bytes()
    (tmp_path / "two" / "latents_stats.pt").unlink()
    prepare(source, tmp_path / "two", vae)
    assert (tmp_path / "two" / "latents_stats.pt").read_bytes() == before


# ---- going on ----


def test_a_command_that_was_killed_goes_on_with_what_is_missing(source, tmp_path, vae, monkeypatch):
    class Killed(BaseException):
        pass

    def die(self, images):
        if dead:
            raise Killed
        dead.append(True)
        return encode(self, images)

    encode, dead = VAE.encode, []
    prepare(source, tmp_path / "unbroken", vae)
    monkeypatch.setattr(VAE, "encode", die)
    with pytest.raises(Killed):
        prepare(source, tmp_path / "broken", vae)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    first = tmp_path / "broken/vae-sd/00000/img-mean-std-00000000.npy"
    written = first.stat().st_mtime_ns
    cut_short(tmp_path / "broken/images/00000/img00000001.png")  # as a power failure leaves it
    prepare(source, tmp_path / "broken", vae)
    assert first.stat().st_mtime_ns == written
    assert_same_files(tmp_path / "broken", tmp_path / "unbroken")


def test_kill_9(source, tmp_path):
    """The process and its workers, at whatever moment; the half-written file that it may leave goes away."""
    write_classes(source, 200)
    flags = ["--source", str(source), "--resolution", "128", "--num-workers", "1", "--dest"]
    command = [sys.executable, "-m", "haste", "prepare", "--vae", "none", *flags, str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "out").glob("images/*/*.png"))) < 20:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("images/*/*.png"))) < 200
    (tmp_path / "out/images/00000/.img00000199.png.1.tmp").write_bytes(b"half")
    time.sleep(0.1)
    for folder in ("out", "unbroken"):
        main(["prepare", "--vae", "none", *flags, str(tmp_path / folder)])
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_ctrl_c_ends_a_command_after_its_batch(source, tmp_path, monkeypatch, capsys):
    def interrupted(self, numbers):
        for count in run(self, numbers):
            signal.raise_signal(signal.SIGINT)
            yield count

    run = Preparation.run
    monkeypatch.setattr(Preparation, "run", interrupted)
    with pytest.raises(SystemExit) as exit_:
        prepare(source, tmp_path / "out", "none", "--num-workers", "1")
    assert exit_.value.code == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert error.endswith("haste prepare: stopped by SIGINT; the same command resumes from there\n")
    assert "5/12" in error and "Traceback" not in error
    assert not (tmp_path / "out" / "images" / "dataset.json").exists()


def test_each_of_several_processes_takes_its_share(source, tmp_path):
    outputs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    words = ["prepare", "--source", str(source), "--vae", "none", "--resolution", "8", "--num-workers", "0"]
    ranks = start_ranks([*words, "--dest", str(tmp_path / "two")], outputs)
    printed = [finish(rank, output) for rank, output in zip(ranks, outputs, strict=True)]
    assert [text.count("is ready for haste train") for text in printed] == [1, 0]
    assert ["6/6" in text for text in printed] == [True, True]
    prepare(source, tmp_path / "one", "none")
    assert_same_files(tmp_path / "one", tmp_path / "two")


# ---- faults ----


def test_bad_images_are_refused_or_left_out(source, tmp_path, vae, capsys):
    cut_short(source / "bee" / "04.png")
    (source / "cat" / "02.png").write_bytes(b"")
    assert "bee/04.png is damaged (image file is truncated); replace it, or skip such files" in refusal(
        capsys, source, tmp_path / "out", vae
    )
    prepare(source, tmp_path / "out", vae, "--on-bad-file", "skip")
    assert "2 of 12 images cannot be read and are left out" in capsys.readouterr().out
    data = load_dataset(str(tmp_path / "out"), 8)
    assert [int(data[index].label) for index in range(len(data))] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_destination_of_another_command_is_left_alone(source, tmp_path, vae, capsys):
    prepare(source, tmp_path / "out", vae)
    before = contents(tmp_path / "out")
    line = refusal(capsys, source, tmp_path / "out", vae, "--resolution", "16")
    assert "--dest must be another folder" in line and line.endswith(" with resolution 8, not 16")
    (source / "ant" / "00.png").unlink()
    assert " with images 12, not 11; source " in refusal(capsys, source, tmp_path / "out", vae)
    assert contents(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out" / "images")
    (tmp_path / "out" / "prepare.json").unlink()
    assert "--dest must be a new folder" in refusal(capsys, source, tmp_path / "out", vae)


def test_disk_space_is_looked_at_first(source, tmp_path, vae, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**16))
    line = refusal(capsys, source, tmp_path / "out", vae)
    assert line.endswith("free, and the data takes 96 KiB")  # 24 files of one block
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**17))
    prepare(source, tmp_path / "out", vae)


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told_in_one_line(source, tmp_path, capsys, monkeypatch):
    def full(self, kind, number, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Destination, "write", full)
    assert "out cannot be written: No space left on device; existing files are kept" in refusal(
        capsys, source, tmp_path / "out", "none", "--num-workers", "1"
    )
    (tmp_path / "file").write_text("in the way")
    assert "which holds something else" in refusal(capsys, source, tmp_path / "file", "none")
    assert f"--dest must be a folder that can be written, got {tmp_path}/file/out: Not a" in refusal(
        capsys, source, tmp_path / "file" / "out", "none"
    )


def test_flags_that_make_no_sense(source, tmp_path, vae, capsys):
    for flags, sentence in [
        (("--resolution", "0"), "--resolution must be an integer from 1 to 16,384, got 0"),
        (("--resolution", "10"), "--resolution must be a multiple of 4"),
        (("--num-workers", "-1"), "--num-workers must be an integer from 0 to 1,024, got -1"),
        (("--source", str(tmp_path / "nothing")), "--source must be .*nothing, which does not exist"),
        (("--dest", str(source / "out")), "--dest must be a folder outside --source, got .*"),
    ]:
        assert re.search(sentence, refusal(capsys, source, tmp_path / "out", vae, *flags))
    assert not (tmp_path / "out").exists()


def test_what_a_kill_of_the_first_write_leaves_is_no_other_folder(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in (".prepare.json.12.tmp", ".lock"):
        (tmp_path / "out" / name).write_text("half")
    with hold(tmp_path / "out", "it is"):
        assert "out is in use by this process" in refusal(capsys, source, tmp_path / "out", "none")
    prepare(source, tmp_path / "out", "none")
    prepare(source, tmp_path / "unbroken", "none")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
