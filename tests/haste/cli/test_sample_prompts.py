"""`haste sample --prompts`: the images of texts, and the captions that stay beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_run import write_run
from drawn_images import read_images
from forked_haste import finish, start_ranks
from haste import plotting
from haste.cli.main import main
from haste.data.images import open_images
from haste.generation.sample_dir import SampleDir, read_captions
from PIL import Image
from text_files import CAPTIONS, TOKENS, WIDTH, save_text_encoder
from text_run import write_text_run

QUICK = ("--num-steps", "3", "--num-fid-samples", "5")
TWO = ("a red temple", "a dark flower")


@pytest.fixture(autouse=True)
def grids(monkeypatch) -> list[tuple]:
    """What grids are plotted of, which takes longer than to sample these images."""
    plotted: list[tuple] = []
    monkeypatch.setattr(plotting, "plot_grid", lambda *args, **settings: plotted.append((*args, settings)))
    return plotted


@pytest.fixture
def run(tmp_path) -> Path:
    return write_text_run(tmp_path / "exps")


@pytest.fixture
def two(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TWO))
    return tmp_path / "prompts.txt"


def refusal(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["sample", *map(str, arguments)])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste sample:")]
    assert len(errors) == 1
    return errors[0]


def folders(run: Path) -> list[Path]:
    return sorted(path for path in (run / "samples").iterdir() if path.is_dir())


def test_captions_stand_beside_the_images_in_the_npz_and_in_the_grid(run, two, capsys, grids):
    main(["sample", "--ckpt", str(run), *QUICK, "--prompts", str(two), "--cfg-scale", "2", "--guidance-high", "0.8"])
    (folder,) = folders(run)
    captions = [TWO[number % 2] for number in range(5)]
    assert read_captions(folder) == captions
    npz = open_images(folder.with_name(folder.name + ".npz"), "--samples")
    assert npz.captions == captions and npz.labels is None
    assert (np.concatenate(list(npz.batches(8))) == read_images(folder)).all()
    ((path, images, texts, options),) = grids
    assert path == folder.with_name(folder.name + "-grid.png") and (images == read_images(folder)).all()
    assert texts == captions and options["below"]
    settings = json.loads((folder / "sample.json").read_text())["settings"]
    assert settings["prompts"].startswith("2 prompts, ") and "labels" not in settings
    assert "5 images at" in capsys.readouterr().out


def test_a_prompt_itself_and_the_captions_of_the_data(run):
    main(["sample", "--ckpt", str(run), *QUICK, "--prompts", TWO[0]])
    main(["sample", "--ckpt", str(run), *QUICK])
    alone, prompted = folders(run)
    assert read_captions(prompted) == [TWO[0]] * 5 and read_captions(alone) == CAPTIONS[:5]
    assert json.loads((prompted / "sample.json").read_text())["settings"]["prompts"] == TWO[0]


def test_a_command_that_was_killed_resumes_and_more_images_have_more_captions(run, two, monkeypatch):
    class Killed(BaseException):
        pass

    words = ["sample", "--ckpt", str(run), *QUICK, "--prompts", str(two), "--per-proc-batch-size", "2"]
    count = SampleDir.count

    def count_to_two(self, *what):
        count(self, *what)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SampleDir, "count", count_to_two)
        with pytest.raises(Killed):
            main(words)
    (folder,) = folders(run)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(written) == 2 and read_captions(folder) is None
    main(words)
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    main([*words, "--num-fid-samples", "7"])
    main([*words, "--num-fid-samples", "3"])  # of the folder's seven images
    assert read_captions(folder) == [TWO[number % 2] for number in range(7)]
    assert open_images(folder.with_name(folder.name + ".npz"), "--samples").captions == [*TWO, TWO[0]]
    whole = run / "elsewhere"
    main([*words, "--num-fid-samples", "7", "--sample-dir", str(whole)])
    (other,) = [path for path in whole.iterdir() if path.is_dir()]
    assert (read_images(other) == read_images(folder)).all()


def test_other_prompts_have_another_folder_also_under_the_same_name(run, two, capsys):
    main(["sample", "--ckpt", str(run), *QUICK, "--prompts", str(two)])
    two.write_text("a red temple\na bright square\n")
    main(["sample", "--ckpt", str(run), *QUICK, "--prompts", str(two)])
    assert len(folders(run)) == 2


@pytest.fixture
def features(tmp_path) -> Path:
    """Three images with captions in REPA's layout: two, one and three of them."""
    folder, generator = tmp_path / "coco256_features" / "val", np.random.default_rng(0)
    folder.mkdir(parents=True)

    def save(name: str, *shape: int) -> None:
        np.save(folder / name, generator.normal(size=shape).astype(np.float32))

    for number, count in ((3, 2), (7, 1), (40, 3)):
        save(f"{number}.npy", 8, 4, 4)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / f"{number}.png")
        for choice in range(count):
            save(f"{number}_{choice}.npy", TOKENS, WIDTH)
    np.save(folder.parent / "empty_context.npy", np.zeros((TOKENS, WIDTH), np.float32))
    return folder


def test_a_folder_of_features_gives_one_caption_of_each_image_in_order(run, features):
    from haste.generation.config import SamplingConfig
    from haste.generation.loaded import load_checkpoint
    from haste.generation.pipeline import Sampler

    words = ["sample", "--ckpt", str(run), *QUICK, "--prompts", str(features), "--cfg-scale", "2"]
    main(words)
    (folder,) = folders(run)
    assert folder.name.endswith("prompts-val") and read_captions(folder) == [None] * 5
    sampler = Sampler(load_checkpoint(run), SamplingConfig(prompts=str(features), num_steps=1))
    stored = {path.name: np.load(path) for path in features.glob("*_*.npy")}
    names = [
        next(name for name, array in stored.items() if (array == each.numpy()).all())
        for each in sampler.conditions.of(range(60))
    ]
    assert [name.split("_")[0] for name in names] == ["3", "7", "40"] * 20
    assert set(names) == set(stored)  # every caption comes, by the seed and the number
    other = Sampler(load_checkpoint(run), SamplingConfig(prompts=str(features), global_seed=1)).conditions
    assert not torch.equal(other.of(range(60)), sampler.conditions.of(range(60)))

    np.save(features / "3.npy", np.zeros((8, 4, 4), np.float32))
    np.save(features / "3_0.npy", np.ones((TOKENS, WIDTH), np.float32))
    with pytest.raises(SystemExit):  # these are other captions
        main([*words, "--num-fid-samples", "6"])


def test_features_of_another_width_and_an_encoder_beside_features(run, features, capsys):
    clip = run.parent / "clip"
    message = refusal(capsys, "--ckpt", run, *QUICK, "--prompts", features, "--text-encoder", clip)
    assert "--text-encoder must be left out" in message
    for path in (*features.glob("*_*.npy"), features.parent / "empty_context.npy"):
        np.save(path, np.zeros((TOKENS, WIDTH + 1), np.float32))
    message = refusal(capsys, "--ckpt", run, *QUICK, "--prompts", features)
    assert f"--prompts must be features of {TOKENS} tokens of {WIDTH} numbers" in message
    assert "--prompts must be" in refusal(capsys, "--ckpt", run, *QUICK, "--prompts", run)


def test_flags_that_a_model_of_the_other_kind_has_are_refused(run, two, tmp_path, capsys):
    assert "--labels must be left out" in refusal(capsys, "--ckpt", run, *QUICK, "--labels", "3,1")
    classes = write_run(tmp_path / "classes")
    assert "--prompts must be left out" in refusal(capsys, "--ckpt", classes, *QUICK, "--prompts", two)
    wide = save_text_encoder(tmp_path / "wide", width=WIDTH + 4)
    message = refusal(capsys, "--ckpt", run, *QUICK, "--prompts", two, "--text-encoder", wide)
    assert "--text-encoder must be" in message and str(WIDTH + 4) in message
    two.write_text("\n")
    assert "--prompts must be" in refusal(capsys, "--ckpt", run, *QUICK, "--prompts", two)
    two.write_bytes(b"Flu\xdf")
    assert "--prompts must be" in refusal(capsys, "--ckpt", run, *QUICK, "--prompts", two)
    assert not (run / "samples").exists()


def test_the_flags_of_generate_t2i(run, two):
    """All of REPA's script; its data path is --prompts here."""
    flags = [
        "--global-seed", "3", "--tf32", "--sample-dir", str(run / "out"), "--prefix", "mine", "--num-classes", "1000",
        "--encoder-depth", "8", "--resolution", "8", "--no-fused-attn", "--no-qk-norm", "--per-proc-batch-size", "4",
        "--num-fid-samples", "5", "--mode", "sde", "--cfg-scale", "2.25", "--path-type", "linear", "--num-steps", "3",
        "--no-heun", "--guidance-low", "0", "--guidance-high", "0.9", "--no-legacy",
    ]  # fmt: skip
    main(["sample", "--ckpt", str(run / "checkpoints" / "0000004.pt"), *flags, "--prompts", str(two)])
    (folder,) = [path for path in (run / "out").iterdir() if path.is_dir()]
    assert folder.name.startswith("mine-0000004-euler-maruyama-3-cfg2.25") and len(read_images(folder)) == 5


def test_two_processes_sample_what_one_does(run, two, tmp_path):
    words = ["sample", "--ckpt", str(run), *QUICK, "--prompts", str(two), "--per-proc-batch-size", "2", "--sample-dir"]
    printed = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    for rank, output in zip(start_ranks([*words, str(tmp_path / "two")], printed), printed, strict=True):
        finish(rank, output)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main([*words, str(tmp_path / "one")])
    torch.set_num_threads(threads)
    (both,), (alone,) = ([p for p in (tmp_path / n).iterdir() if p.is_dir()] for n in ("two", "one"))
    assert (read_images(both) == read_images(alone)).all() and read_captions(both) == read_captions(alone)
    assert "5 images at" in printed[0].read_text() and "5 images at" not in printed[1].read_text()
