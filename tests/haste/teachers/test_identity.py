from __future__ import annotations

import os

import pytest
from haste.teachers.families import PUBLISHED_NAMES
from haste.teachers.loading import PUBLISHED_SHAPES, own_resolution, same_teacher, shape_of
from transformers import CLIPConfig, Dinov2Config


def save(config, folder):
    """A teacher's folder, with weights that nobody reads."""
    config.save_pretrained(folder)
    with open(folder / "model.safetensors", "wb") as weights:
        weights.truncate(2**30)
    return folder


@pytest.fixture
def base(tmp_path):
    return save(Dinov2Config(image_size=518, patch_size=14), tmp_path / "base")  # the other sizes are B's


def test_every_published_teacher_has_its_shape():
    assert PUBLISHED_SHAPES.keys() == PUBLISHED_NAMES.keys()


def test_a_folder_is_told_by_its_config(base, tmp_path):
    assert shape_of(str(base)) == PUBLISHED_SHAPES["dinov2-vit-b"] == shape_of("facebook/dinov2-base")
    assert same_teacher("dinov2-vit-b", str(base)) and same_teacher(str(base), "facebook/dinov2-base")
    assert same_teacher("dinov2-vit-l", str(base)) is False
    clip = save(CLIPConfig(), tmp_path / "clip")
    assert shape_of(str(clip)).model_type == "clip_vision_model"


def test_one_folder_may_be_written_in_two_ways(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (base / "config.json").write_text("{}")  # of which no shape could be told
    assert same_teacher("base", str(base)) and same_teacher(f".{os.sep}base", "base")


def test_names_that_nothing_is_known_of_are_their_own(tmp_path):
    assert same_teacher("somebody/vit", "somebody/vit") is True
    assert same_teacher("somebody/vit", "dinov2-vit-b") is False
    assert same_teacher(str(tmp_path / "gone" / "vit"), "dinov2-vit-b") is None


def test_the_size_that_a_teacher_was_made_for(base):
    assert own_resolution("dinov2-vit-b") == own_resolution(str(base)) == 518
    assert own_resolution("somebody/vit") is None
