"""MAR's cached latents as --data-dir, and the images that are joined for a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BadFile, BatchOrder, batches, load_dataset
from haste.data.images import center_crop
from haste.errors import UserError
from haste.vae import KL16_LATENTS
from image_files import cut_short, photographs, write_mar_cache
from PIL import Image

CPU = torch.device("cpu")


@pytest.fixture
def cache(class_folder, tmp_path) -> Path:
    """Of the 12 images of `class_folder`: latents of 2 x 2, which is 32 pixels."""
    return write_mar_cache(tmp_path / "cache", class_folder)


def everything(data):
    return data.collate([data[index] for index in range(len(data))])


def moments_of(path: Path, key: str) -> torch.Tensor:
    return torch.from_numpy(np.load(path)[key])


def test_class_folders_in_sorted_order_are_the_labels(cache):
    data = load_dataset(str(cache), 32)
    assert (len(data), data.channels, data.input_size, data.num_classes) == (12, 16, 2, 3)
    assert data.class_names == ["ant", "bee", "cat"] and data.latents == KL16_LATENTS
    raw = everything(data)
    assert raw.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    names = sorted(cache.rglob("*.npz"))
    assert torch.equal(raw.moments[5, 0], moments_of(names[5], "moments"))
    assert torch.equal(raw.moments[5, 1], moments_of(names[5], "moments_flip"))


def test_a_zip_of_a_cache_is_the_same_data(cache, tmp_path):
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", cache)
    data, same = load_dataset(str(cache), 32), load_dataset(packed, 32)
    assert torch.equal(everything(data).moments, everything(same).moments)
    assert data.fingerprint() == same.fingerprint()


def test_latents_are_those_of_the_definition(cache):
    """0.2325·(mean + exp(½·clip(logvar, −30, 20))·ε), of either set of moments."""
    path = next(iter(sorted(cache.rglob("*.npz"))))
    mean = np.linspace(-3, 3, 64, dtype=np.float32).reshape(16, 2, 2)
    logvar = np.resize(np.array([-100, -2, 1, 40], dtype=np.float32), (16, 2, 2))
    np.savez(path, moments=np.concatenate([mean, logvar]), moments_flip=np.concatenate([mean + 50, logvar - 60]))
    data = load_dataset(str(cache), 32)
    raw = data.collate([data[0]] * 400)
    inputs = data.to_batch(raw, CPU, torch.Generator().manual_seed(0)).inputs / 0.2325
    generator = torch.Generator().manual_seed(0)
    mirrored = torch.rand(400, generator=generator) < 0.5
    noise = torch.randn(400, 16, 2, 2, generator=generator)
    for flip in (False, True):
        deviation = np.exp(0.5 * np.clip(logvar - 60 * flip, -30, 20))
        expected = torch.from_numpy(mean + 50 * flip) + torch.from_numpy(deviation) * noise[mirrored == flip]
        torch.testing.assert_close(inputs[mirrored == flip], expected, rtol=1e-5, atol=1e-5)
    assert 160 < mirrored.sum() < 240


def test_batches_are_drawn_anew_and_repeat_with_their_generator(cache, class_folder):
    def first(seed: int, workers: int = 0):
        data = load_dataset(str(cache), 32, image_dir=str(class_folder))
        order = BatchOrder(12, 12, seed=3)
        return next(batches(data, order, num_workers=workers, generator=torch.Generator().manual_seed(seed)))

    one, again, other = first(0), first(0, workers=1), first(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.inputs, other.inputs) and torch.equal(one.condition, other.condition)


# ---- the teacher's images ----


def test_images_are_cropped_and_mirrored_where_the_mirrored_latents_were_taken(cache, class_folder):
    data = load_dataset(str(cache), 32, image_dir=str(class_folder))
    data.require_images()
    raw = everything(data)
    raw = raw._replace(moments=torch.stack([torch.zeros(12, 32, 2, 2), torch.full((12, 32, 2, 2), 100.0)], 1))
    raw.moments[:, :, 16:] = -30
    batch = data.to_batch(raw, CPU, torch.Generator().manual_seed(1))
    mirrored = batch.inputs[:, 0, 0, 0] > 1
    assert 0 < mirrored.sum() < 12
    for index, path in enumerate(sorted(class_folder.rglob("*.png"))):
        pixels = torch.from_numpy(center_crop(Image.open(path), 32)).float() / 127.5 - 1
        assert torch.equal(batch.images[index], pixels.flip(-1) if mirrored[index] else pixels)


def test_the_names_of_files_may_be_those_of_any_images(cache, class_folder, tmp_path):
    """n01440764/n01440764_10026.JPEG.npz -> n01440764/n01440764_10026.JPEG"""
    for folder in (cache, class_folder):
        shutil.rmtree(folder)
    for index, image in enumerate(photographs(2, (40, 36))):
        target = tmp_path / "imagenet" / f"n0{index}" / f"n0{index}_7.JPEG"
        target.parent.mkdir(parents=True)
        image.save(target)
        (cache / f"n0{index}").mkdir(parents=True)
        moments = np.zeros((32, 2, 2), dtype=np.float32)
        np.savez(cache / f"n0{index}" / f"n0{index}_7.JPEG.npz", moments=moments, moments_flip=moments)
    data = load_dataset(str(cache), 32, image_dir=str(tmp_path / "imagenet"))
    assert everything(data).pixels.shape == (2, 3, 32, 32) and data.class_names == ["n00", "n01"]
    beside = load_dataset(str(shutil.copytree(cache, tmp_path / "imagenet", dirs_exist_ok=True)), 32)
    assert len(beside) == 2 and beside.latents == KL16_LATENTS  # with the images beside them, too


def test_no_image_is_read_without_a_teacher(cache, class_folder):
    for path in class_folder.rglob("*.png"):
        path.write_bytes(b"")
    for data in (load_dataset(str(cache), 32), load_dataset(str(cache), 32, image_dir=str(class_folder))):
        batch = next(batches(data.without_images(), BatchOrder(12, 4, seed=0)))
        assert batch.images is None and batch.inputs.shape == (4, 16, 2, 2)


def test_a_teacher_needs_the_images(cache, class_folder, tmp_path):
    with pytest.raises(UserError, match="--image-dir must be the images that the latents below .*cache were made of"):
        load_dataset(str(cache), 32).require_images()
    with pytest.raises(UserError, match="--image-dir must be a folder or a zip, got .*nowhere"):
        load_dataset(str(cache), 32, image_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="00.png is missing; .*--on-bad-file skip"):
        load_dataset(str(cache), 32, image_dir=str(cache)).require_images()
    with pytest.raises(UserError, match="--image-dir must come with MAR's cached latents"):
        load_dataset(str(class_folder), 16, image_dir=str(class_folder))
    with pytest.raises(UserError, match="--image-dir must be left out with --data-dir digits"):
        load_dataset("digits", 8, image_dir=str(class_folder))


# ---- shapes and faults ----


def test_any_channels_and_grid_with_the_vae_that_made_them(class_folder, vae_folder, tmp_path):
    cache = write_mar_cache(tmp_path / "cache", class_folder, (8, 6, 6))
    data = load_dataset(str(cache), 24, vae=str(vae_folder))
    assert (data.channels, data.input_size) == (4, 6)
    assert data.latents.scale == (0.5,) * 4 and data.latents.shift == (0.25,) * 4
    with pytest.raises(UserError, match="must hold 8 x 4 x 4 numbers for --resolution 16 and the --vae .* got 8 x 6"):
        load_dataset(str(cache), 16, vae=str(vae_folder))
    with pytest.raises(UserError, match="must hold 32 x 6 x 6 numbers for --resolution 96 .* kl16.ckpt, got 8 x 6 x 6"):
        load_dataset(str(cache), 96)
    with pytest.raises(UserError, match="--resolution must be a multiple of 16"):
        load_dataset(str(cache), 24)


def test_statistics_replace_the_scale(cache, tmp_path):
    torch.save({"mean": torch.ones(16), "std": torch.full((16,), 2.0)}, tmp_path / "stats.pt")
    latents = load_dataset(str(cache), 32, vae_stats=str(tmp_path / "stats.pt")).latents
    assert latents.shift == (1,) * 16 and latents.scale == (0.5,) * 16


def damage(path: Path, kind: str) -> None:
    good = np.zeros((32, 2, 2), dtype=np.float32)
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        cut_short(path)
    elif kind == "no flip":
        np.savez(path, moments=good)
    elif kind == "objects":
        np.savez(path, moments=good, moments_flip=np.array([print], dtype=object))
    else:
        np.savez(path, moments=good, moments_flip=np.full((32, 2, 2), np.nan) if kind == "nan" else good[:, :1])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "is missing"),
        ("cut", "cannot be read as an .npz file"),
        ("no flip", "must hold the arrays moments and moments_flip, got no moments_flip"),
        ("objects", "has no readable moments_flip"),
        ("nan", "must hold finite numbers"),
        ("shape", "must hold 32 x 2 x 2 numbers"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name_or_skipped(cache, kind, sentence):
    path = sorted(cache.rglob("*.npz"))[1]
    data = load_dataset(str(cache), 32, on_bad_file="skip")
    refusing = load_dataset(str(cache), 32)
    damage(path, kind)
    with pytest.raises(BadFile, match=f"{path.name} {sentence}"):
        refusing[1]
    with pytest.raises(UserError, match=f"{path.name} {sentence}.*--on-bad-file skip"):
        next(batches(refusing, BatchOrder(12, 12, seed=0)))
    batch = next(batches(data, BatchOrder(12, 12, seed=0)))
    assert len(batch.inputs) == 12 and list(data.skipped) == [str(path)]


def test_the_fingerprint_knows_other_latents_and_labels(cache, tmp_path):
    def taken():
        return load_dataset(str(cache), 32).fingerprint()

    before = taken()
    assert before["images"] == 12 and taken() == before
    shutil.move(cache, tmp_path / "moved")
    assert load_dataset(str(tmp_path / "moved"), 32).fingerprint() == before
    shutil.move(tmp_path / "moved", cache)
    np.savez(sorted(cache.rglob("*.npz"))[0], moments=np.zeros((32, 2, 2)), moments_flip=np.zeros((32, 2, 2)))
    assert taken()["files"] != before["files"] and taken()["names"] == before["names"]
    (cache / "cat").rename(cache / "aardvark")
    assert taken()["labels"] == before["labels"] and taken()["names"] != before["names"]


def test_images_with_an_array_beside_them_stay_images(class_folder):
    np.savez(class_folder / "statistics.npz", mu=np.zeros(3))
    assert load_dataset(str(class_folder), 8).latents is None
