from __future__ import annotations

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation.images import read_npz
from haste.generation.sample_folder import SampleFolder, read_record

SETTINGS = {"checkpoint": "0000002.pt", "num_steps": 4, "labels": "random"}
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_nothing_is_written_before_the_first_picture(tmp_path):
    folder = SampleFolder(tmp_path / "new", SETTINGS)
    assert folder.missing(3) == [0, 1, 2] and list(tmp_path.iterdir()) == []


def test_a_second_start_draws_what_is_missing_and_adds_up_the_seconds(tmp_path):
    first = SampleFolder(tmp_path / "s", SETTINGS)
    first.add([0, 1, 2], PICTURES[:3], seconds=1.5, evaluations=4, full=2)
    (first.path / "000001.png").unlink()

    second = SampleFolder(tmp_path / "s", SETTINGS)
    assert second.missing(6) == [1, 3, 4, 5]
    second.add([1, 3, 4, 5], PICTURES[[1, 3, 4, 5]], seconds=0.5, evaluations=4, full=2)
    assert second.drawn.pictures == 7 and second.drawn.seconds == 2.0 and second.drawn.pictures_per_second == 3.5
    assert (second.drawn.evaluations_per_picture, second.drawn.full_per_picture) == (4, 2)

    labels = np.arange(6)
    assert (second.collect(6, labels) == PICTURES).all()
    images, saved = read_npz(tmp_path / "s.npz")
    assert (images == PICTURES).all() and (saved == labels).all()


def test_fewer_pictures_than_there_are_can_be_collected(tmp_path):
    folder = SampleFolder(tmp_path / "s", SETTINGS)
    folder.add(list(range(6)), PICTURES, 1.0, 4, 4)
    assert (folder.collect(2, np.zeros(2)) == PICTURES[:2]).all()


def test_a_folder_of_another_command_is_refused_with_what_differs(tmp_path):
    SampleFolder(tmp_path / "s", SETTINGS).add([0], PICTURES[:1], 1.0, 4, 4)
    with pytest.raises(UserError, match=r"another command \(num_steps 4, now 5\); give another --sample-dir"):
        SampleFolder(tmp_path / "s", {**SETTINGS, "num_steps": 5})
    with pytest.raises(UserError, match="interval unset, now 3"):
        SampleFolder(tmp_path / "s", {**SETTINGS, "interval": 3})
    assert read_record(tmp_path / "s")["settings"] == SETTINGS


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than samples"):
        SampleFolder(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="holds something else than samples"):
        SampleFolder(tmp_path / "notes.txt", SETTINGS)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(UserError, match="sample.json cannot be read"):
        SampleFolder(tmp_path, SETTINGS)
