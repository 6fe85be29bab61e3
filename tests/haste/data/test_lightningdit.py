"""LightningDiT's shards of latents as --data-dir, their statistics, and the images that are joined for a teacher."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BadFile, BatchOrder, batches, load_dataset
from haste.data.images import center_crop
from haste.errors import UserError
from image_files import cut_short, save_vae
from PIL import Image
from safetensors.torch import load_file, save_file

SHAPE = (3, 2, 2)  # C, S, S: 4 pixels a latent at resolution 8
MEAN, STD = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 4.0])


def write_latents(folder: Path, images: Path, ranks: int = 2, per_shard: int = 3, dtype=torch.float32) -> Path:
    """What extract_features.py writes on `ranks` processes: number k of ImageFolder has latents of value k, its mirror
    image of value k + 100."""
    folder.mkdir()
    files = sorted(images.glob("*/*.png"))
    classes = sorted({file.parent.name for file in files})
    rounds = -(-len(files) // ranks)
    for rank in range(ranks):
        numbers = [(step * ranks + rank) % len(files) for step in range(rounds)]
        for shard, start in enumerate(range(0, rounds, per_shard)):
            part = torch.tensor(numbers[start : start + per_shard])
            latents = part.view(-1, 1, 1, 1).expand(-1, *SHAPE).to(dtype)
            labels = torch.tensor([classes.index(files[number].parent.name) for number in part])
            name = f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
            tensors = {"latents": latents.contiguous(), "latents_flip": latents + 100, "labels": labels}
            save_file(tensors, folder / name, {"dtype": str(dtype)})
    torch.save({"mean": MEAN.view(1, 3, 1, 1), "std": STD.view(1, 3, 1, 1)}, folder / "latents_stats.pt")
    return folder


@pytest.fixture
def shards(tmp_path, class_folder) -> Path:
    """Of the 12 images of `class_folder`: two processes, two shards each of 3 images."""
    return write_latents(tmp_path / "latents", class_folder)


def edit(path: Path, **changes) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def numbers_of(data) -> torch.Tensor:
    """The images' numbers in ImageFolder, with 100 for a mirror image, from model inputs."""
    order = BatchOrder(len(data), len(data), seed=0)
    inputs = next(batches(data, order)).inputs
    values = inputs * STD.view(1, 3, 1, 1) + MEAN.view(1, 3, 1, 1)
    assert torch.allclose(values, values[:, :1, :1, :1].expand_as(values), atol=1e-4)
    return values[:, 0, 0, 0].round()[order.batch(0).argsort()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_are_normalized_by_the_statistics_beside_them(tmp_path, class_folder, dtype):
    data = load_dataset(str(write_latents(tmp_path / "latents", class_folder, dtype=dtype)), 8)
    assert (len(data), data.channels, data.input_size, data.num_classes, data.latents.factor) == (12, 3, 2, 3, 4)
    assert data.latents.shift == tuple(MEAN.tolist()) and data.latents.scale == tuple((1 / STD).tolist())
    assert numbers_of(data).tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]  # process after process
    batch = next(batches(data, BatchOrder(12, 12, seed=0), num_workers=2))
    assert batch.images is None and batch.inputs.dtype == torch.float32
    raw = data.collate([pickle.loads(pickle.dumps(data))[index] for index in range(12)])
    assert raw.label.tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_random_flip_takes_either(shards):
    data = load_dataset(str(shards), 8, random_flip=True)
    assert data.read(3, 0).moments.unique().tolist() == [6] and data.read(3, 1).moments.unique().tolist() == [106]
    assert set((numbers_of(data) >= 100).tolist()) == {False, True}
    assert load_dataset(str(shards), 8).read(3, 1).moments.unique().tolist() == [6]
    edit(shards / "latents_rank01_shard001.safetensors", latents_flip=None)
    with pytest.raises(UserError, match="--random-flip must be left out for the latents .* have no latents_flip"):
        load_dataset(str(shards), 8, random_flip=True)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_images_are_joined_in_the_order_of_image_folder(tmp_path, class_folder, ranks):
    folder = write_latents(tmp_path / "latents", class_folder, ranks)
    data = load_dataset(str(folder), 8, image_dir=str(class_folder), random_flip=True)
    files = sorted(class_folder.glob("*/*.png"))
    assert len(data) == -(-12 // ranks) * ranks
    for index in range(len(data)):
        plain, mirrored = data.read(index, 0), data.read(index, 1)
        number = int(plain.moments.unique())
        assert (plain.pixels.numpy() == center_crop(Image.open(files[number]).convert("RGB"), 8)).all()
        assert torch.equal(mirrored.pixels, plain.pixels.flip(-1))
    data.require_images()
    assert next(batches(data, BatchOrder(len(data), 4, seed=0))).images.shape == (4, 3, 8, 8)
    assert next(batches(data.without_images(), BatchOrder(len(data), 4, seed=0))).images is None


def test_images_that_cannot_be_joined_are_refused(shards, class_folder):
    with pytest.raises(UserError, match="--image-dir must be the images that the latents in .* got none"):
        load_dataset(str(shards), 8).require_images()
    (class_folder / "ant" / "03.png").rename(class_folder / "bee" / "99.png")
    with pytest.raises(UserError, match="--image-dir must .* has label 1, but 0 in latents_rank"):
        load_dataset(str(shards), 8, image_dir=str(class_folder))
    (class_folder / "bee" / "99.png").unlink()
    (class_folder / "bee" / "01.png").unlink()
    with pytest.raises(UserError, match="--image-dir must hold the 12 images .* got 10 in class folders"):
        load_dataset(str(shards), 8, image_dir=str(class_folder))


def test_statistics_and_vae_that_fit(shards, tmp_path):
    torch.save({"latents_scale": torch.full((3,), 2.0), "latents_bias": torch.zeros(3)}, tmp_path / "own.pt")
    assert load_dataset(str(shards), 8, vae_stats=str(tmp_path / "own.pt")).latents.scale == (2.0,) * 3
    vae = str(save_vae(tmp_path / "vae", channels=3))
    data = load_dataset(str(shards), 8, vae=vae)
    assert data.latents.vae == vae and data.latents.scale == tuple((1 / STD).tolist())
    (shards / "latents_stats.pt").unlink()
    assert load_dataset(str(shards), 8, vae=vae).latents.scale == (0.5,) * 3
    with pytest.raises(UserError, match="--vae-stats must be .*, which has no latents_stats.pt, got none"):
        load_dataset(str(shards), 8)


def test_settings_that_do_not_fit_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="--vae must have 3 channels and 2 latents along a side .* got 4 and 2"):
        load_dataset(str(shards), 8, vae=str(save_vae(tmp_path / "vae")))
    with pytest.raises(UserError, match="--resolution must be a multiple of 2, .* got 9"):
        load_dataset(str(shards), 9)
    with pytest.raises(UserError, match="--latents-dir must be left out with LightningDiT's shards, got x"):
        load_dataset(str(shards), 8, latents_dir="x")
    with pytest.raises(UserError, match="--num-classes must be at least 3"):
        load_dataset(str(shards), 8, num_classes=2)
    torch.save({"mean": MEAN}, shards / "latents_stats.pt")
    with pytest.raises(UserError, match="--vae-stats must hold .* mean and std, got .*latents_stats.pt"):
        load_dataset(str(shards), 8)


# ---- faults ----

FAULTS = {
    "cut short": (cut_short, "has no readable latents"),
    "empty": (lambda path: path.write_bytes(b""), "has no readable latents"),
    "no labels": (lambda path: edit(path, labels=None), "has no readable labels"),
    "no latents": (lambda path: edit(path, latents=None), "has no readable latents"),
    "mixed shapes": (
        lambda path: edit(path, latents=torch.zeros(3, 4, 2, 2), latents_flip=torch.zeros(3, 4, 2, 2)),
        "must hold latents of 3 x 2 x 2, as latents_rank00_shard000.safetensors, got 4 x 2 x 2",
    ),
    "fewer labels": (lambda path: edit(path, labels=torch.zeros(2).long()), r"must hold latents \(n, C, S, S\) and"),
    "other mirrors": (
        lambda path: edit(path, latents_flip=torch.zeros(3, 3, 1, 1)),
        "must hold latents_flip as lat",
    ),
    "negative labels": (lambda path: edit(path, labels=torch.tensor([0, -1, 0])), "must have labels from 0 to"),
    "labels of floats": (lambda path: edit(path, labels=torch.zeros(3)), "must have labels from 0 to"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_shards_that_cannot_be_used_are_refused_or_skipped(shards, fault, caplog):
    damage, sentence = FAULTS[fault]
    damage(shards / "latents_rank01_shard000.safetensors")
    with pytest.raises(UserError, match=f"latents_rank01_shard000.safetensors {sentence}"):
        load_dataset(str(shards), 8)
    data = load_dataset(str(shards), 8, on_bad_file="skip")
    assert numbers_of(data).tolist() == [0, 2, 4, 6, 8, 10, 7, 9, 11]
    assert "skipped: " in caplog.text
    with pytest.raises(UserError, match="--image-dir must be left out where shards are skipped"):
        load_dataset(str(shards), 8, on_bad_file="skip", image_dir="x")


def test_missing_shards_are_named(shards):
    (shards / "latents_rank01_shard000.safetensors").unlink()
    with pytest.raises(UserError, match="1 shards of .* are missing, the first being .*rank01_shard000.safetensors"):
        load_dataset(str(shards), 8)
    assert len(load_dataset(str(shards), 8, on_bad_file="skip")) == 9


def test_a_missing_last_shard_is_noticed_by_the_other_processes(shards, caplog):
    (shards / "latents_rank01_shard001.safetensors").unlink()
    with pytest.raises(UserError, match="1 processes have fewer latents in .*, the first being .*rank01"):
        load_dataset(str(shards), 8)
    assert len(load_dataset(str(shards), 8, on_bad_file="skip")) == 9 and "rank01" in caplog.text


def test_numbers_that_are_not_finite_are_a_bad_file(shards):
    edit(shards / "latents_rank00_shard000.safetensors", latents=torch.full((3, *SHAPE), torch.nan))
    with pytest.raises(UserError, match="latents 0 of .*rank00_shard000.safetensors must hold finite numbers"):
        load_dataset(str(shards), 8)
    data = load_dataset(str(shards), 8, on_bad_file="skip")
    with pytest.raises(BadFile, match="must hold finite numbers"):
        data[1]
    assert len(next(batches(data, BatchOrder(12, 12, seed=0))).inputs) == 12 and len(data.skipped) == 3


def test_the_fingerprint_knows_the_latents_and_not_the_place(shards, tmp_path):
    before = load_dataset(str(shards), 8).fingerprint()
    moved = shards.rename(tmp_path / "moved")
    assert load_dataset(str(moved), 8).fingerprint() == before
    for path in moved.glob("*.safetensors"):
        edit(path, latents=load_file(path)["latents"] + 1)
    after = load_dataset(str(moved), 8).fingerprint()
    assert after["files"] != before["files"] and after["names"] == before["names"]
    assert np.array_equal(after["labels"], before["labels"])
