"""The fingerprint by which a run knows its data again."""

import json
import shutil

import numpy as np
import pytest
from haste.data import load_dataset
from haste.data.dataset import COMPARED, describe_change, fingerprint, other_latents
from PIL import Image


def write_class_folders(folder, count=40):
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(path)
    return folder


def write_repa_layout(folder, count=40):
    for number in range(count):
        image, moments = folder / f"images/img{number}.png", folder / f"vae-sd/img-mean-std-{number}.npy"
        for path in (image, moments):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(image)
        np.save(moments, np.full((8, 1, 1), number, dtype=np.float32))
    set_labels(folder, [number % 3 for number in range(count)])
    return folder


def set_labels(folder, labels):
    listed = [[f"img-mean-std-{number}.npy", label] for number, label in enumerate(labels)]
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": listed}))


def look(folder):
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(load_dataset(str(folder), 8).fingerprint()))


@pytest.mark.parametrize("write", [write_class_folders, write_repa_layout])
def test_data_that_moved_or_was_packed_is_the_same(tmp_path, write):
    began = look(write(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert describe_change(began, look(tmp_path / "there")) == []
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "there")
    assert describe_change(began, look(packed)) == []


def test_another_number_of_images_is_told(tmp_path):
    began = look(write_class_folders(tmp_path))
    (tmp_path / "class0" / "000.png").unlink()
    assert describe_change(began, look(tmp_path)) == ["39 images, which were 40"]


def test_another_name_is_told(tmp_path):
    began = look(write_class_folders(tmp_path))
    (tmp_path / "class0" / "000.png").rename(tmp_path / "class0" / "999.png")
    assert describe_change(began, look(tmp_path)) == ["other names of files"]


def test_another_label_is_told(tmp_path):
    began = look(write_repa_layout(tmp_path))
    set_labels(tmp_path, [2, *(number % 3 for number in range(1, 40))])
    assert describe_change(began, look(tmp_path)) == ["other labels"]


def test_latents_that_were_made_anew_are_told_and_a_file_that_was_restored_is_not(tmp_path):
    began = look(write_repa_layout(tmp_path))
    np.save(tmp_path / "vae-sd" / "img-mean-std-0.npy", np.full((8, 1, 1), 99, dtype=np.float32))
    assert describe_change(began, look(tmp_path)) == []
    for number in range(40):
        np.save(tmp_path / f"vae-sd/img-mean-std-{number}.npy", np.full((8, 1, 1), 99, dtype=np.float32))
    assert describe_change(began, look(tmp_path)) == ["other files (16 of the 16 that are compared)"]


def test_what_a_checkpoint_does_not_tell_is_not_compared(tmp_path):
    now = look(write_class_folders(tmp_path))
    assert describe_change({}, now) == describe_change({"images": 40}, now) == []


@pytest.mark.parametrize("count", [1, 2, COMPARED, 1_281_167])
def test_the_files_that_are_looked_at_are_spread(count):
    seen = []

    def read(index):
        seen.append(index)
        return b""

    assert len(fingerprint(count, b"", None, read)["files"]) == min(count, COMPARED)
    assert seen[0] == 0 and seen[-1] == count - 1 and seen == sorted(set(seen))


def test_latents_of_another_scale_are_others_and_a_vae_that_moved_is_the_same():
    began = {"vae": "/here/vae", "channels": 1, "factor": 8, "shift": [0.0], "scale": [0.5]}
    assert not other_latents(began, {**began, "vae": "/there/vae", "scale": (0.5,)})
    assert other_latents(began, {**began, "scale": (0.18215,)})
    assert other_latents(began, {**began, "channels": 2, "shift": (0.0, 0.0), "scale": (0.5, 0.5)})
