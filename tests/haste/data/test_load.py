"""What --data-dir may name, REPA's layout among it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BadFile, BatchOrder, batches, load_dataset
from haste.data.repa_layout import image_name, latent_name, pair_files
from haste.errors import UserError
from haste.registry import DATASETS
from haste.vae import VAE, LatentFormat
from image_files import cut_short, photographs, pixels_of


def test_a_small_set_from_elsewhere_by_its_name(tmp_path, monkeypatch):
    code = "import torch\ndef load():\n    return torch.zeros(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])\n"
    (tmp_path / "toys_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DATASETS, "toys", "toys_plugin:load")
    data = load_dataset("toys", 4)
    assert (len(data), data.channels, data.num_classes) == (5, 3, 3)
    assert next(batches(data, BatchOrder(5, 5, seed=0))).condition.sort().values.tolist() == [0, 0, 1, 1, 2]


def test_digits_by_name():
    data = load_dataset("digits", 8)
    assert (len(data), data.channels, data.resolution, data.input_size, data.num_classes) == (1797, 1, 8, 8, 10)
    assert data.latents is None and data.without_images() is data


def test_images_of_a_folder_as_pixels(class_folder):
    data = load_dataset(str(class_folder), 8)
    assert (len(data), data.channels, data.resolution, data.input_size, data.num_classes) == (12, 3, 8, 8, 3)
    batch = next(batches(data, BatchOrder(12, 12, seed=0)))
    assert batch.inputs.shape == (12, 3, 8, 8) and batch.inputs.dtype == torch.float32
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1
    assert batch.condition.dtype == torch.int64


def test_images_of_a_folder_as_latents_made_on_the_fly(class_folder, vae_folder):
    data = load_dataset(str(class_folder), 8, vae=str(vae_folder))
    assert (data.channels, data.input_size, data.latents) == (4, 2, LatentFormat.of(str(vae_folder)))
    order = BatchOrder(12, 12, seed=0)
    batch = next(batches(data, order, num_workers=2, generator=torch.Generator().manual_seed(0)))
    assert batch.images.shape == (12, 3, 8, 8)
    moments = VAE(data.latents).encode(batch.images)
    expected = data.latents.sample_posterior(moments, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.inputs, expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing", 8), "--data-dir must be .* or one of: digits, .*got 'nothing'"),
        (("", 8), "--data-dir must be .* or one of: digits, .*got ''"),
        (("digits", 16), "--resolution must be 8, as the digits images, got 16"),
    ],
)
def test_data_that_does_not_exist_or_fit_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_dataset(*arguments)


@pytest.mark.parametrize("name", ["vae", "vae_stats", "latents_dir"])
def test_a_setting_of_latents_is_refused_for_pixels_in_memory(name):
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} must be left out with --data-dir digits, .* got x"):
        load_dataset("digits", 8, **{name: "x"})


def test_a_listed_image_that_is_missing_is_refused_or_skipped(repa_folder, caplog):
    shutil.rmtree(repa_folder / "vae-sd")
    labels = [[image_name(number), number % 2] for number in range(6)]
    (repa_folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (repa_folder / "images" / image_name(2)).unlink()
    with pytest.raises(UserError, match=r"1 of the files that .*dataset.json lists .*img00000002.png; .*--on-bad-file"):
        load_dataset(str(repa_folder), 16)
    data = load_dataset(str(repa_folder), 16, on_bad_file="skip")
    assert everything(data).label.tolist() == [0, 1, 1, 0, 1]
    assert "skipped: 1 of the files" in caplog.text


def test_settings_that_do_not_fit_a_folder_are_refused(class_folder, vae_folder):
    folder = str(class_folder)
    with pytest.raises(UserError, match="--vae-stats must come with --vae"):
        load_dataset(folder, 8, vae_stats="x.pt")
    with pytest.raises(UserError, match="--resolution must be a multiple of 4"):
        load_dataset(folder, 10, vae=str(vae_folder))
    with pytest.raises(UserError, match="--num-classes must be at least 3, as in the data, got 2"):
        load_dataset(folder, 8, num_classes=2)
    cut_short(class_folder / "ant" / "00.png")
    with pytest.raises(UserError, match="ant/00.png is damaged"):
        load_dataset(folder, 8)
    assert load_dataset(folder, 8, num_classes=1000, on_bad_file="skip").num_classes == 1000


CPU = torch.device("cpu")


def everything(data):
    return data.collate([data[index] for index in range(len(data))])


def test_images_moments_and_labels_belong_together(repa_folder):
    data = load_dataset(str(repa_folder), 16)
    assert (len(data), data.num_classes, data.channels, data.input_size, data.resolution) == (6, 4, 4, 2, 16)
    for index, image in enumerate(photographs(6, (16, 16))):
        sample = data[index]
        assert (sample.pixels.numpy() == pixels_of(image)).all()
        assert sample.moments[:4].unique().tolist() == [index] and sample.label == index % 4


def test_latents_are_drawn_anew_with_stable_diffusions_scale(repa_folder):
    data = load_dataset(str(repa_folder), 16)
    raw = everything(data)
    draws = torch.stack([data.to_batch(raw, CPU).inputs for _ in range(400)])
    means = torch.arange(6).view(6, 1, 1, 1) * 0.18215
    torch.testing.assert_close(draws.mean(0), means.expand(6, 4, 2, 2), rtol=0, atol=0.03)
    assert draws.std(0).mean().item() == pytest.approx(0.5 * 0.18215, rel=0.03)
    batch = data.to_batch(raw, CPU)
    assert batch.images.shape == (6, 3, 16, 16) and batch.inputs.dtype == torch.float32


def test_without_images_none_is_read(repa_folder):
    data = load_dataset(str(repa_folder), 16)
    silent = data.without_images()
    shutil.rmtree(repa_folder / "images")
    batch = next(batches(silent, BatchOrder(6, 6, seed=0), num_workers=1))
    assert batch.images is None and batch.inputs.shape == (6, 4, 2, 2)
    with pytest.raises(BadFile, match="is missing"):
        data[0]


@pytest.mark.parametrize("packing", ["each", "all"])
def test_zips_hold_the_same_data(repa_folder, packing):
    expected = everything(load_dataset(str(repa_folder), 16))
    if packing == "all":
        root = Path(shutil.make_archive(str(repa_folder), "zip", repa_folder))
    else:
        root = repa_folder
        for name in ("images", "vae-sd"):
            shutil.make_archive(str(root / name), "zip", root / name)
            shutil.rmtree(root / name)
    data = load_dataset(str(root), 16)
    assert all(torch.equal(a, b) for a, b in zip(everything(data), expected, strict=True))
    assert len(next(batches(data, BatchOrder(6, 6, seed=0), num_workers=2)).condition) == 6


def test_the_names_are_those_of_repas_preprocessing():
    assert image_name(12_345) == "00012/img00012345.png"
    assert latent_name(12_345) == "00012/img-mean-std-00012345.npy"


def test_files_pair_by_name_or_else_by_position():
    assert pair_files(["a/img1.png", "a/img2.png"], ["a/img-mean-std-2.npy"]) == {"a/img-mean-std-2.npy": "a/img2.png"}
    assert pair_files(["x/cat.jpg"], ["x/cat.npy"]) == {"x/cat.npy": "x/cat.jpg"}
    assert pair_files(["a.png", "b.png"], ["1.npy", "2.npy"]) == {"1.npy": "a.png", "2.npy": "b.png"}
    assert pair_files(["a.png", "b.png"], ["1.npy"]) == {}


def test_labels_may_lie_beside_the_images(repa_folder):
    (repa_folder / "vae-sd" / "dataset.json").unlink()
    labels = [[image_name(index), 5 - index] for index in range(6)]
    (repa_folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert everything(load_dataset(str(repa_folder), 16)).label.tolist() == [5, 4, 3, 2, 1, 0]


def test_no_labels_make_one_class(repa_folder):
    (repa_folder / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    data = load_dataset(str(repa_folder), 16)
    assert data.num_classes == 1 and everything(data).label.tolist() == [0] * 6


def test_moments_may_be_of_half_precision_and_have_a_leading_one(repa_folder):
    path = repa_folder / "vae-sd" / latent_name(3)
    np.save(path, np.load(path).astype(np.float16)[None])
    moments = load_dataset(str(repa_folder), 16)[3].moments
    assert moments.dtype == torch.float32 and moments.shape == (8, 2, 2)


def test_the_vae_may_have_another_shape_and_scale(repa_folder, vae_folder):
    for path in repa_folder.glob("vae-sd/*/*.npy"):
        np.save(path, np.zeros((8, 4, 4), dtype=np.float32))
    data = load_dataset(str(repa_folder), 16, vae=str(vae_folder))
    assert data.input_size == 4
    batch = data.to_batch(everything(data), CPU)
    assert batch.inputs.unique().tolist() == [-0.125]  # (0 − 0.25)·0.5


def test_statistics_replace_the_scale(repa_folder, tmp_path):
    torch.save({"mean": torch.ones(4), "std": torch.full((4,), 2.0)}, tmp_path / "stats.pt")
    latents = load_dataset(str(repa_folder), 16, vae_stats=str(tmp_path / "stats.pt")).latents
    assert latents.shift == (1,) * 4 and latents.scale == (0.5,) * 4


# ---- faults ----


def test_another_resolution_than_the_files_have_is_refused_at_once(repa_folder, vae_folder):
    with pytest.raises(UserError, match="img00000000.png must have 32 x 32 pixels, as --resolution, got 16 x 16"):
        load_dataset(str(repa_folder), 32)
    with pytest.raises(UserError, match="--resolution must be a multiple of 8"):
        load_dataset(str(repa_folder), 20)
    with pytest.raises(UserError, match="must hold 8 x 4 x 4 numbers for --resolution 16, got 8 x 2 x 2"):
        load_dataset(str(repa_folder), 16, vae=str(vae_folder))


def test_files_without_a_counterpart_are_refused_or_skipped(repa_folder, caplog):
    (repa_folder / "images" / image_name(2)).unlink()
    (repa_folder / "vae-sd" / latent_name(4)).unlink()
    with pytest.raises(UserError, match=r"3 files have no counterpart .*, the first being .*img00000004.png; restore"):
        load_dataset(str(repa_folder), 16)
    data = load_dataset(str(repa_folder), 16, on_bad_file="skip")
    assert everything(data).label.tolist() == [0, 1, 3, 1]
    assert "skipped: 3 files have no counterpart" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not numpy at all"])
def test_moments_that_are_no_whole_array_are_bad_files(repa_folder, content):
    path = repa_folder / "vae-sd" / latent_name(1)
    path.write_bytes(content)
    with pytest.raises(BadFile, match="img-mean-std-00000001.npy is no valid .npy file"):
        load_dataset(str(repa_folder), 16)[1]


def test_moments_cut_short_and_moments_that_are_not_finite_are_bad_files(repa_folder):
    data = load_dataset(str(repa_folder), 16)
    cut_short(repa_folder / "vae-sd" / latent_name(1))
    with pytest.raises(BadFile, match="is no valid .npy file"):
        data[1]
    np.save(repa_folder / "vae-sd" / latent_name(2), np.full((8, 2, 2), np.nan, dtype=np.float32))
    with pytest.raises(BadFile, match="must hold finite numbers"):
        data[2]
    np.save(repa_folder / "vae-sd" / latent_name(3), np.full((8, 2, 2), 1e300))
    with warnings.catch_warnings(), pytest.raises(BadFile, match="must hold finite numbers"):
        warnings.simplefilter("error")
        data[3]


def test_an_array_of_objects_is_not_unpickled(repa_folder):
    np.save(repa_folder / "vae-sd" / latent_name(1), np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(BadFile, match="is no valid .npy file"):
        load_dataset(str(repa_folder), 16)[1]


def test_missing_parts_are_refused(repa_folder, tmp_path):
    with pytest.raises(UserError, match="--num-classes must be at least 4, as in the data, got 3"):
        load_dataset(str(repa_folder), 16, num_classes=3)
    assert load_dataset(str(repa_folder), 16, num_classes=1000).num_classes == 1000
    (repa_folder / "vae-sd" / "dataset.json").unlink()
    with pytest.raises(UserError, match="vae-sd/dataset.json is missing; it must list the labels"):
        load_dataset(str(repa_folder), 16)
    shutil.rmtree(repa_folder / "images")
    with pytest.raises(UserError, match="--data-dir must hold .*images beside .*vae-sd"):
        load_dataset(str(repa_folder), 16)
    (tmp_path / "empty" / "vae-sd").mkdir(parents=True)
    (tmp_path / "empty" / "images").mkdir()
    with pytest.raises(UserError, match="--data-dir must hold images with their latents"):
        load_dataset(str(tmp_path / "empty"), 16)
