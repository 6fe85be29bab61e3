"""`haste prepare --captions` on real photographs with a tiny VAE and a tiny text encoder."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.data import BatchOrder, batches, load_dataset
from haste.data.caption_folder import Encoders
from haste.data.caption_sources import open_captioned
from haste.data.captions import open_captions
from haste.data.images import square_crop
from haste.data.prepare_captions import ShardFolder
from haste.text import TextEncoder, TextFormat
from haste.vae import VAE, LatentFormat
from image_files import (
    captions_of,
    cut_short,
    photographs,
    pixels_of,
    save_vae,
    write_coco,
    write_hub_captions,
    write_pairs,
    write_tars,
)
from PIL import Image
from safetensors.numpy import load_file
from text_files import save_text_encoder

COUNT = 6
WRITERS = {"coco": write_coco, "pairs": write_pairs, "tars": write_tars, "hub": write_hub_captions}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("haste.data.prepare_captions.IMAGES_PER_SHARD", 4)
    monkeypatch.setattr("haste.data.prepare_captions.CAPTIONS_PER_SHARD", 4)


def words(captions: Path, dest: Path, vae: object, clip: object, layout: str, *flags: str) -> list[str]:
    common = ["--resolution", "8", "--batch-size", "3", "--num-workers", "0", "--layout", layout]
    paths = ["--captions", str(captions), "--dest", str(dest), "--vae", str(vae), "--text-encoder", str(clip)]
    return ["prepare", *paths, *common, *flags]


@pytest.fixture
def prepare(vae, clip):
    def run(captions: Path, dest: Path, layout: str, *flags: str) -> None:
        main(words(captions, dest, vae, clip, layout, *flags))
        AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.fixture(params=["shards", "repa"])
def layout(request) -> str:
    return request.param


def refusal(capsys, run, *arguments) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste prepare:")]
    return line


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a folder by name."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".npy":
            found[name] = np.load(path)
        elif path.suffix == ".safetensors":
            found |= {f"{name}:{key}": array for key, array in load_file(path).items()}
        elif path.suffix == ".pt":
            found |= {f"{name}:{key}": value.numpy() for key, value in torch.load(path, weights_only=True).items()}
        elif path.is_file():
            found[name] = np.frombuffer(path.read_bytes(), np.uint8)
    return found


def assert_same_arrays(one: Path, two: Path) -> None:
    """Moments and features may differ in their last digits: how a batch is cut up decides how products round."""
    a, b = arrays(one), arrays(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name].astype(float), b[name].astype(float), rtol=2e-3, atol=1e-3, err_msg=name)


def check_content(folder: Path, vae: Path, clip: Path, numbers=range(COUNT), close: float = 40) -> None:
    """Images, moments and features of a prepared folder against their definition."""
    data, encoder, captions = load_dataset(str(folder), 8), VAE(LatentFormat.of(str(vae))), open_captions(folder)
    text = TextEncoder(TextFormat.of(str(clip)))
    assert data.text == text.text and data.latents == encoder.latents
    torch.testing.assert_close(data.null, text.encode([""])[0])
    assert len(data) == len(numbers)
    originals = photographs(max(numbers) + 1)
    for index, number in enumerate(numbers):
        assert captions.count(index) == len(captions_of(number))
        sample = data[index]
        assert np.abs(sample.pixels.numpy().astype(int) - square_crop(originals[number], 8)).max() < close  # JPEG's
        images = sample.pixels[None] / 127.5 - 1
        d = encoder._model.encode(images).latent_dist
        expected = torch.cat([d.mean, d.logvar], dim=1)[0]
        torch.testing.assert_close(sample.moments, expected, rtol=1e-3, atol=1e-4)
        for choice, caption in enumerate(captions_of(number)):
            found, features = captions.caption(index, choice)
            assert found == caption
            torch.testing.assert_close(features, text.encode([caption])[0], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_captions_becomes_either_layout(form, layout, tmp_path, prepare, vae, clip, capsys):
    source = WRITERS[form](tmp_path / "source")
    prepare(source, tmp_path / "out" / "train", layout)
    assert f"{tmp_path}/out/train is ready for haste train --data-dir" in capsys.readouterr().out
    check_content(tmp_path / "out" / "train", vae, clip)
    record = json.loads((tmp_path / "out/train/prepare.json").read_text())
    assert record["latents"]["vae"] == str(vae) and record["text"]["encoder"] == str(clip)
    assert "Lanczos" in record["crop"] and "source" in record["captions_of"] and record["held"] == COUNT
    before = arrays(tmp_path / "out")
    prepare(source, tmp_path / "out" / "train", layout)
    assert before.keys() == arrays(tmp_path / "out").keys()


def test_images_are_cropped_to_the_largest_square_and_written_as_they_are(tmp_path, prepare):
    write_pairs(tmp_path / "source")
    prepare(tmp_path / "source", tmp_path / "out", "repa")
    image = Image.open(tmp_path / "source" / "00.png")
    expected = image.crop((2, 0, 18, 16)).resize((8, 8), Image.Resampling.LANCZOS)
    assert (pixels_of(Image.open(tmp_path / "out" / "0.png")) == pixels_of(expected)).all()


def test_repas_layout_is_that_of_the_public_features(tmp_path, prepare):
    prepare(write_coco(tmp_path / "coco"), tmp_path / "out" / "train", "repa")
    names = {f"{index}.{suffix}" for index in range(COUNT) for suffix in ("png", "npy")}
    names |= {f"{index}_{n}.npy" for index in range(COUNT) for n in range(len(captions_of(index)))}
    assert {path.name for path in (tmp_path / "out/train").iterdir()} == {
        *names, "prepare.json", "captions.json", "latents_stats.pt"}  # fmt: skip
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["empty_context.npy"]
    assert np.load(tmp_path / "out/train/0.npy").dtype == np.load(tmp_path / "out/train/0_0.npy").dtype == np.float32
    prepare(write_coco(tmp_path / "coco"), tmp_path / "out" / "val", "repa")  # a second split of the same encoder
    prepare(write_coco(tmp_path / "coco"), tmp_path / "alone", "repa")
    assert (tmp_path / "alone" / "empty_context.npy").is_file()


def test_the_splits_of_a_folder_have_one_encoder(tmp_path, prepare, vae, capsys):
    source = write_coco(tmp_path / "coco")
    prepare(source, tmp_path / "out" / "train", "repa")
    other = save_text_encoder(tmp_path / "t5", "t5")

    def run() -> None:
        main(words(source, tmp_path / "out" / "val", vae, other, "repa"))

    assert "--text-encoder must be the one of" in refusal(capsys, run)


def test_each_caption_is_encoded_once_for_the_shards(tmp_path, prepare, monkeypatch):
    seen = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: seen.extend(prompts) or encode(self, prompts))
    prepare(write_pairs(tmp_path / "source"), tmp_path / "out", "shards")
    assert seen == ["", *dict.fromkeys(caption for index in range(COUNT) for caption in captions_of(index))]


def test_without_a_vae_the_shards_hold_images_and_captions(tmp_path, prepare, clip, capsys):
    source = write_pairs(tmp_path / "source")
    main(words(source, tmp_path / "out", "none", clip, "shards"))
    data = load_dataset(str(tmp_path / "out"), 8)
    batch = next(batches(data, BatchOrder(COUNT, COUNT, seed=0)))
    assert data.latents is None and batch.inputs.shape == (COUNT, 3, 8, 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    line = refusal(capsys, main, words(source, tmp_path / "other", "none", clip, "repa"))
    assert "--vae must be a VAE with --layout repa" in line


# ---- going on ----


@pytest.mark.parametrize(("part", "method"), [(VAE, "encode_to_logvar"), (TextEncoder, "encode")])
def test_a_command_that_was_killed_goes_on_with_what_is_missing(tmp_path, prepare, layout, monkeypatch, part, method):
    class Killed(BaseException):
        pass

    def die(self, *arguments):
        calls.append(True)
        if dying and len(calls) > 2:
            raise Killed
        return original(self, *arguments)

    calls, dying, original = [], [], getattr(part, method)
    monkeypatch.setattr(part, method, die)
    source = write_coco(tmp_path / "coco", 9)
    prepare(source, tmp_path / "unbroken", layout)
    calls, dying = [], [True]
    with pytest.raises(Killed):
        prepare(source, tmp_path / "broken", layout)
    dying = []
    AcceleratorState._reset_state(reset_partial_state=True)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("[0-9ci]*-0*.*")}
    (tmp_path / "broken" / ".images-00000.safetensors.1.tmp").write_bytes(b"half")
    prepare(source, tmp_path / "broken", layout)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert_same_arrays(tmp_path / "broken", tmp_path / "unbroken")


def test_files_that_a_power_failure_cut_short_are_written_again(tmp_path, prepare):
    source = write_coco(tmp_path / "coco")
    prepare(source, tmp_path / "out", "repa")
    expected = arrays(tmp_path / "out")
    record = json.loads((tmp_path / "out/prepare.json").read_text())
    (tmp_path / "out/prepare.json").write_text(json.dumps({**record, "finished": False}))
    for name in ("1.png", "2.npy", "3_0.npy"):
        cut_short(tmp_path / "out" / name)
    (tmp_path / "out/5_2.npy").unlink()
    prepare(source, tmp_path / "out", "repa")
    assert expected.keys() == arrays(tmp_path / "out").keys()
    assert len(load_dataset(str(tmp_path / "out"), 8)) == COUNT


def test_ctrl_c_ends_a_command_after_its_batch(tmp_path, prepare, layout, monkeypatch, capsys):
    encode = VAE.encode_to_logvar

    def interrupted(self, images):
        signal.raise_signal(signal.SIGINT)
        return encode(self, images)

    monkeypatch.setattr(VAE, "encode_to_logvar", interrupted)
    with pytest.raises(SystemExit) as exit_:
        prepare(write_coco(tmp_path / "coco"), tmp_path / "out", layout)
    assert exit_.value.code == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert error.endswith("haste prepare: stopped by SIGINT; the same command resumes from there\n")
    assert "3/6" in error and "Traceback" not in error
    assert json.loads((tmp_path / "out/prepare.json").read_text())["finished"] is False


def test_each_of_several_processes_takes_its_share(tmp_path, prepare, vae, clip):
    source = write_pairs(tmp_path / "source")
    outputs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    ranks = start_ranks(words(source, tmp_path / "two", vae, clip, "repa"), outputs)
    printed = [finish(rank, output) for rank, output in zip(ranks, outputs, strict=True)]
    assert [text.count("is ready for haste train") for text in printed] == [1, 0]
    assert all("3/3" in text for text in printed)
    prepare(source, tmp_path / "one", "repa")
    assert_same_arrays(tmp_path / "one", tmp_path / "two")


def test_processes_share_the_shards(tmp_path, prepare, vae, clip):
    source = write_pairs(tmp_path / "source", 9)
    prepare(source, tmp_path / "one", "shards")
    text, latents = TextFormat.of(str(clip)), LatentFormat.of(str(vae))
    folder = ShardFolder(tmp_path / "two", open_captioned(source), 8, latents, text)
    encoders = Encoders(VAE(latents), TextEncoder(text), 3, 0, "refuse")
    folder.create(encoders)
    totals = []
    for process in (1, 0):
        for stage in folder.stages(encoders, process, 2):
            assert sum(stage.run) == stage.total - stage.done
            totals.append((process, stage.name, stage.total))
    assert totals == [(1, "captions", 2), (1, "images", 4), (0, "captions", 4), (0, "images", 5)]
    folder.finish()
    (tmp_path / "one/latents_stats.pt").unlink()  # which the command measures at its end
    assert_same_arrays(tmp_path / "one", tmp_path / "two")


# ---- faults ----


def test_bad_images_and_captions_are_refused_or_left_out(tmp_path, prepare, layout, vae, clip, capsys):
    source = write_pairs(tmp_path / "source")
    cut_short(source / "01.jpg")
    (source / "02.txt").write_bytes(b"\xff\xfe")
    line = refusal(capsys, prepare, source, tmp_path / "out", layout)
    assert re.search(r"0[12]\.(jpg|txt) .*; replace it, or skip such files with --on-bad-file skip", line)
    AcceleratorState._reset_state(reset_partial_state=True)
    prepare(source, tmp_path / "out", layout, "--on-bad-file", "skip")
    assert "2 images or captions cannot be read and are left out" in capsys.readouterr().out
    check_content(tmp_path / "out", vae, clip, [0, 3, 4, 5])


def test_captions_that_are_too_long_are_truncated_counted_and_said(tmp_path, prepare, layout, capsys, caplog):
    source = write_pairs(tmp_path / "source")
    (source / "02.txt").write_text(" ".join(["a red temple"] * 9))
    prepare(source, tmp_path / "out", layout)
    assert "1 captions of more than 10 tokens are truncated" in capsys.readouterr().out
    assert "prompts of more than 10 tokens are truncated" in caplog.text


def test_a_destination_of_another_command_is_left_alone(tmp_path, prepare, layout, capsys):
    source = write_pairs(tmp_path / "source")
    prepare(source, tmp_path / "out", layout)
    before = arrays(tmp_path / "out")
    other = "shards" if layout == "repa" else "repa"
    for flags, difference in [(["--resolution", "16"], "resolution 8, not 16"), (["--layout", other], "layout")]:
        assert difference in refusal(capsys, prepare, source, tmp_path / "out", layout, *flags)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert before.keys() == arrays(tmp_path / "out").keys()


def test_disk_space_is_looked_at_first(tmp_path, prepare, layout, capsys, monkeypatch):
    source = write_pairs(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 100}))
    assert "--dest must have more space" in refusal(capsys, prepare, source, tmp_path / "out", layout)


def test_flags_that_make_no_sense(tmp_path, prepare, capsys):
    source = write_pairs(tmp_path / "source")
    dest = ["--dest", str(tmp_path / "out")]
    for arguments, sentence in [
        ([*dest], "--source must be given, or --captions"),
        ([*dest, "--source", str(source), "--layout", "repa"], "--layout must come with --captions"),
        ([*dest, "--source", str(source), "--text-encoder", "x"], "--text-encoder must come with --captions"),
        ([*dest, "--captions", str(source), "--zip"], "--zip must be left out with --captions"),
        ([*dest, "--captions", str(source), "--text-encoder", "x"], "--text-encoder must be a folder"),
        ([*dest, "--captions", str(tmp_path / "nowhere")], "--captions must be captions that exist"),
        (["--dest", str(source / "out"), "--captions", str(source)], "--dest must be a folder outside --captions"),
    ]:
        assert sentence in refusal(capsys, main, ["prepare", "--vae", "none", *arguments])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "out").exists()
