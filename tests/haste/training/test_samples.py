from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.generation import load_checkpoint
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler
from haste.training import samples
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.logging import Trackers, project
from haste.training.samples import CAPTION_LINES, TITLE_HEIGHT, as_grid, caption_bars, title_bar, wrap
from haste.training.trainer import train
from image_files import save_vae, write_classes
from PIL import Image


def weights_of(result):
    return read_checkpoint(checkpoint_path(result.folder / "checkpoints", result.step))["model"]


def test_a_run_leaves_previews_and_is_the_run_without_them(make_config):
    seen = train(make_config(exp_name="seen", sampling_steps=5))
    blind = train(make_config(exp_name="blind", sampling_steps=0))
    assert sorted(path.name for path in (seen.folder / "samples").iterdir()) == [
        "0000005.png", "0000010.png", "0000012.png"]  # fmt: skip
    first, second = (np.asarray(Image.open(seen.folder / "samples" / f"{step:07d}.png")) for step in (5, 10))
    assert first.shape == (328, 272, 3)  # 4 x 4 images of 8 pixels, enlarged eight times, margins and titles
    assert (first != second).any()
    assert not (blind.folder / "samples").exists()
    a, b = weights_of(seen), weights_of(blind)
    assert all(torch.equal(a[name], b[name]) for name in a)


PLAIN = {"proj_coeff": 0.0, "attn_coeff": 0.0, "max_train_steps": 2, "sampling_steps": 1, "resolution": 16,
         "num_workers": 0}  # fmt: skip


def test_latents_are_decoded(make_config, tmp_path):
    classes, vae = write_classes(tmp_path / "classes"), save_vae(tmp_path / "vae")
    result = train(make_config(data_dir=str(classes), vae=str(vae), **PLAIN))
    assert Image.open(result.folder / "samples" / "0000002.png").size == (272, 328)


@pytest.mark.parametrize(("model", "channels"), [("DiT-Digits/2", 3), ("SiT-Digits/2", None)])
def test_guidance_is_that_of_haste_sample(make_config, tmp_path, monkeypatch, model, channels):
    """DiT guides three of four channels."""
    made, solver = [], samples.Solver
    monkeypatch.setattr(samples, "Solver", lambda **settings: made.append(settings) or solver(**settings))
    classes, vae = write_classes(tmp_path / "classes"), save_vae(tmp_path / "vae")
    result = train(make_config(data_dir=str(classes), vae=str(vae), model=model, **PLAIN))
    assert [settings["guided_channels"] for settings in made] == [channels] * 2
    assert Sampler(load_checkpoint(result.folder), SamplingConfig())._new_solver([]).guided_channels == channels


def test_without_the_decoder_training_goes_on_and_says_so_once(make_config, tmp_path, monkeypatch, caplog):
    classes, vae = write_classes(tmp_path / "classes"), save_vae(tmp_path / "vae")

    def cannot_be_had(latents):
        raise UserError("the VAE cannot be loaded")

    monkeypatch.setattr(samples, "VAE", cannot_be_had)
    with caplog.at_level(logging.WARNING):
        result = train(make_config(data_dir=str(classes), vae=str(vae), **PLAIN))
    assert result.step == 2 and caplog.text.count("no samples are made during training: the VAE cannot be loaded") == 1
    assert (result.folder / "samples" / "missing.txt").read_text() == "the VAE cannot be loaded\n"


def test_a_run_shorter_than_its_sampling_steps_has_a_preview_of_its_end_with_the_names_of_classes(
    make_config, tmp_path, monkeypatch
):
    titles = []
    monkeypatch.setattr(samples, "title_bar", lambda title, width: titles.append(title) or title_bar(title, width))
    classes = write_classes(tmp_path / "classes")
    result = train(make_config(data_dir=str(classes), **{**PLAIN, "sampling_steps": 1000}))
    assert [path.name for path in (result.folder / "samples").iterdir()] == ["0000002.png"]
    assert titles == [("ant", "bee", "cat")[index % 3] for index in range(16)]


def test_a_title_is_drawn_whatever_it_holds():
    plain = title_bar("", 64)
    assert plain.shape == (14, 64, 3)
    for title in ("cat", "a very long name, that goes on and on", "日本語 \ud800"):
        assert (title_bar(title, 64) != plain).any()


def test_trackers_get_the_samples_and_wandb_the_project_of_its_environment(make_config, monkeypatch):
    class Fake:
        def __init__(self, name):
            self.name, self.shown = name, []

        def log_images(self, values, step, **layout):
            self.shown.append((values["samples"].shape, step, layout))

    trackers = Trackers(SimpleNamespace(trackers=[Fake("wandb"), Fake("tensorboard")]))
    trackers.log_image(np.zeros((4, 6, 3), np.uint8), 7)
    first, second = (tracker.shown for tracker in trackers.accelerator.trackers)
    assert first == [((1, 4, 6, 3), 7, {})] and second == [((1, 4, 6, 3), 7, {"dataformats": "NHWC"})]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert project(make_config(report_to="wandb")) == "mine" and project(make_config()) == "haste"
    monkeypatch.delenv("WANDB_PROJECT")
    assert project(make_config(report_to="wandb")) == "haste"


@pytest.mark.parametrize("side", [2, 100])
def test_a_grid_is_filled_row_by_row(side):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)
    grid = as_grid(images, ["", "", "", ""])
    size = max(1, 64 // side) * side + 4
    assert grid.shape == (2 * (size + 14), 2 * size, 3)
    inside = grid[16, 2, 0], grid[16, -3, 0], grid[-3, 2, 0], grid[-3, -3, 0]
    assert inside == (0, 1, 2, 3) and (grid[0] == 96).all()


def test_captions_stand_below_their_images_and_are_wrapped():
    images = np.full((4, 8, 8, 3), 255, np.uint8)
    captions = ["a seven", "a handwritten seven, slanted to the right and written with a thin pen", "", "日本語"]
    grid = as_grid(images, captions, below=True)
    lines = caption_bars(captions, 128)
    assert lines.shape[1] > TITLE_HEIGHT and lines.shape[1] % TITLE_HEIGHT == 0
    height = 128 + lines.shape[1] + 4  # enlarged, with margins
    assert grid.shape == (2 * height, 2 * 132, 3)
    assert (grid[2:130, 2:130] == 255).all() and (grid[130 : 130 + lines.shape[1], 2:130] == lines[0]).all()
    second = lines[1].reshape(-1, TITLE_HEIGHT, 128, 3)
    assert all((line != 96).any() for line in second)  # something stands on every line
    assert (lines[0][TITLE_HEIGHT:] == 96).all() and (lines[2] == 96).all()


def test_words_are_wrapped_and_a_caption_without_end_is_cut_off():
    assert wrap("one two three", lambda text: len(text) <= 7) == ["one two", "three"]
    assert wrap("incomprehensible word", lambda text: len(text) <= 7) == ["incomprehensible", "word"]
    cut = wrap("word " * 100, lambda text: len(text) <= 9)
    assert len(cut) == CAPTION_LINES and cut[-1] == "word word ..." and wrap("", len) == [""]
