from __future__ import annotations

import json

import numpy as np
import pytest
from drawn_images import read_npz
from haste.errors import UserError
from haste.generation.sample_dir import SampleDir, Samples, read_record
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


def test_a_image_that_cannot_be_read_is_named(tmp_path):
    folder = SampleDir(tmp_path / "s", SETTINGS)
    folder.write(range(3), IMAGES[:3])
    cut_short(folder.path / "000001.png")
    with pytest.raises(UserError, match="000001.png cannot be read"):
        folder.collect(np.zeros(3))
    assert not folder.npz.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = SampleDir(tmp_path / "s", SETTINGS)
    folder.write([0], IMAGES[:1])
    (folder.path / "000001.png").mkdir()  # what no rename replaces, whoever runs this
    with pytest.raises(UserError, match="--sample-dir .* cannot be written"):
        folder.write([1], IMAGES[1:2])
    folder.npz.mkdir()
    with pytest.raises(UserError, match="s.npz cannot be written: .*; the images are all there"):
        folder.collect(np.zeros(1))


def test_a_folder_of_another_command_is_refused_with_what_differs(tmp_path):
    SampleDir(tmp_path / "s", SETTINGS).write([0], IMAGES[:1])
    with pytest.raises(UserError, match="--sample-dir must be another .*: num_steps 4, now 5$"):
        SampleDir(tmp_path / "s", {**SETTINGS, "num_steps": 5})
    with pytest.raises(UserError, match="interval unset, now 3"):
        SampleDir(tmp_path / "s", {**SETTINGS, "interval": 3})
    with pytest.raises(UserError, match="labels random, now 1,2,3,.{0,40}[.][.][.]$"):
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
        with pytest.raises(UserError, match="s is being filled by .*; give another --sample-dir"):
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
