"""--latents-dir: which folder of latents beside images/ is used, and those that would be passed over are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BatchOrder, batches, load_dataset
from haste.data.sources import open_source
from haste.errors import UserError
from haste.vae import SD_LATENTS
from image_files import photographs, write_classes


def as_layout(root: Path, layout: str, *folders: str) -> str:
    """The data as a folder, as one zip, or with a zip for each folder."""
    if layout == "zip":
        return shutil.make_archive(str(root), "zip", root)
    for name in folders if layout == "zips" else ():
        shutil.make_archive(str(root / name), "zip", root / name)
        shutil.rmtree(root / name)
    return str(root)


LAYOUTS = pytest.mark.parametrize("layout", ["folder", "zip", "zips"])


@LAYOUTS
def test_latents_of_another_name_are_used_where_the_flag_names_them(repa_folder, layout):
    expected = load_dataset(str(repa_folder), 16)
    expected = expected.collate([expected[index] for index in range(6)])
    (repa_folder / "vae-sd").rename(repa_folder / "vae-in")
    root = as_layout(repa_folder, layout, "images", "vae-in")
    data = load_dataset(root, 16, latents_dir="vae-in")
    found = data.collate([data[index] for index in range(6)])
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@LAYOUTS
def test_latents_of_another_name_are_named_with_the_flag_rather_than_passed_over(repa_folder, layout):
    (repa_folder / "vae-sd").rename(repa_folder / "vae-in")
    root = as_layout(repa_folder, layout, "images", "vae-in")
    with pytest.raises(UserError, match="--latents-dir must be vae-in, .* to train on pixels, .*vae-in holds .npy"):
        load_dataset(root, 16)
    with pytest.raises(UserError, match="--source must be .* --latents-dir vae-in .*vae-in holds .npy files"):
        open_source(Path(root), "--source")
    if layout != "zip":
        images = repa_folder / ("images.zip" if layout == "zips" else "images")
        assert len(load_dataset(str(images), 16)) == len(open_source(images, "--source")) == 6


def test_latents_beside_the_default_ones_are_a_choice_to_be_made(repa_folder):
    shutil.copytree(repa_folder / "vae-sd", repa_folder / "vae-in")
    with pytest.raises(UserError, match="--latents-dir must be vae-sd or vae-in, .* got none for"):
        load_dataset(str(repa_folder), 16)
    assert len(load_dataset(str(repa_folder), 16, latents_dir="vae-sd")) == 6
    shutil.rmtree(repa_folder / "vae-in")
    shutil.copytree(repa_folder / "vae-sd", repa_folder / "vae-sd-flip")  # those of the mirror images are no others
    (repa_folder / "notes").mkdir()
    np.save(repa_folder / "mean.npy", np.zeros(4))
    assert len(load_dataset(str(repa_folder), 16)) == 6


@pytest.mark.parametrize("name", ["vae-in", "images", "", "..", "vae-sd/00000", "/tmp"])
def test_a_name_that_is_no_folder_of_latents_is_refused(repa_folder, name):
    with pytest.raises(UserError, match="--latents-dir must be a folder of latents beside images in .* got '"):
        load_dataset(str(repa_folder), 16, latents_dir=name)


def test_latents_of_the_mirror_images_are_not_those_of_the_images(repa_folder):
    shutil.copytree(repa_folder / "vae-sd", repa_folder / "vae-sd-flip")
    with pytest.raises(UserError, match="--latents-dir must be vae-sd, .*--random-flip.* got vae-sd-flip"):
        load_dataset(str(repa_folder), 16, latents_dir="vae-sd-flip")


def test_the_flag_needs_the_layout_with_images(class_folder):
    with pytest.raises(UserError, match="--latents-dir must be a folder of latents .*, which has none, got"):
        load_dataset(str(class_folder), 8, latents_dir="vae-in")


def test_the_record_of_prepare_names_the_folder(repa_folder):
    (repa_folder / "vae-sd").rename(repa_folder / "vae-in")
    (repa_folder / "prepare.json").write_text(json.dumps({"latents": None, "latents_dir": "vae-in"}))
    assert len(load_dataset(str(repa_folder), 16)) == 6
    (repa_folder / "prepare.json").write_text(json.dumps({"latents": None, "latents_dir": 3}))
    with pytest.raises(UserError, match="latents_dir of the record must be"):
        load_dataset(str(repa_folder), 16)


@pytest.mark.parametrize("packed", [False, True])
def test_latents_among_class_folders_are_named(tmp_path, packed):
    root = write_classes(tmp_path / "photos")
    np.save(root / "ant" / "00.npy", np.zeros(4))  # beside its image, in a folder of images
    given = Path(shutil.make_archive(str(root), "zip", root)) if packed else root
    assert len(open_source(given, "--data-dir")) == 12
    (root / "vae-in").mkdir()
    np.save(root / "vae-in" / "00.npy", np.zeros(4))
    given = Path(shutil.make_archive(str(root), "zip", root)) if packed else root
    for flag in ("--data-dir", "--source"):
        with pytest.raises(UserError, match=f"{flag} must hold images only, .* --latents-dir vae-in, .* would not be"):
            open_source(given, flag)


def test_the_layout_one_folder_further_down_is_found_whatever_the_latents_are_called(repa_folder):
    (repa_folder / "vae-sd").rename(repa_folder / "vae-in")
    with pytest.raises(UserError, match="--data-dir must be repa in .*, which holds vae-in, or a zip"):
        load_dataset(str(repa_folder.parent), 16)


# ---- files of latents, which are not sampled ----


def test_latents_without_a_deviation_are_shifted_and_scaled_alone(tmp_path):
    """SR-DiT's vae-in: img-latents-NNNNNNNN.npy of (1, C, S, S)."""
    root = tmp_path / "data"
    (root / "images/00000").mkdir(parents=True)
    (root / "vae-in/00000").mkdir(parents=True)
    latents = np.random.default_rng(0).normal(size=(5, 1, 4, 2, 2)).astype(np.float32)
    for index, image in enumerate(photographs(5, (16, 16))):
        image.save(root / f"images/00000/img{index:08d}.png")
        np.save(root / f"vae-in/00000/img-latents-{index:08d}.npy", latents[index])
    listed = [[f"00000/img-latents-{index:08d}.npy", index % 3] for index in range(5)]
    (root / "vae-in/dataset.json").write_text(json.dumps({"labels": listed}))
    torch.save({"latents_scale": torch.full((1, 4, 1, 1), 2.0), "latents_bias": torch.ones(1, 4, 1, 1)}, root / "st.pt")
    for stats, shift, scale in ((None, 0.0, SD_LATENTS.scale[0]), (str(root / "st.pt"), 1.0, 2.0)):
        data = load_dataset(str(root), 16, latents_dir="vae-in", vae_stats=stats)
        order = BatchOrder(5, 5, seed=0)
        batch = next(batches(data, order))
        expected = (torch.from_numpy(latents[:, 0])[order.batch(0)] - shift) * scale
        torch.testing.assert_close(batch.inputs, expected)
        assert torch.equal(batch.condition, order.batch(0) % 3)
    np.save(root / "vae-in/00000/img-latents-00000001.npy", np.zeros((8, 2, 2), np.float32))
    with pytest.raises(UserError, match="img-latents-00000001.npy must hold 4 x 2 x 2 numbers .* got 8 x 2 x 2"):
        next(batches(load_dataset(str(root), 16, latents_dir="vae-in"), BatchOrder(5, 5, seed=0)))
