"""--random-flip mirrors an image by the seed and its position in the stream alone, for model and teacher alike."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from haste.data import BadFile, BatchOrder, batches, load_dataset
from haste.data.captions import CaptionedImages, InMemoryCaptions
from haste.data.dataset import describe_change, to_unit
from haste.errors import UserError
from haste.registry import DATASETS
from haste.vae import VAE
from image_files import cut_short

STEPS, SIZE = 9, 4  # three epochs of the twelve images


def take(data, seed=0, start=0, count=STEPS, **options):
    return list(itertools.islice(batches(data, BatchOrder(len(data), SIZE, seed), start, **options), count))


def flips(data, plain, seed=0):
    """Which images of the stream are mirrored, (STEPS, SIZE); all others are as they were."""
    found = []
    for flipped, batch in zip(take(data, seed), take(plain, seed), strict=True):
        mirrored = (flipped.images != batch.images).flatten(1).any(dim=1)
        assert torch.equal(flipped.images[mirrored], batch.images[mirrored].flip(-1))
        assert torch.equal(flipped.condition, batch.condition)
        found.append(mirrored)
    return torch.stack(found)


@pytest.fixture(params=["folder", "memory"])
def pair(request, class_folder, monkeypatch):
    """The same data with random flips and without."""
    name = str(class_folder)
    if request.param == "memory":
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.rand(12, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(12) % 3
        monkeypatch.setitem(DATASETS, "small", f"{__name__}:small")
        monkeypatch.setitem(globals(), "small", lambda: (images, labels))
        name = "small"
    return load_dataset(name, 8, random_flip=True), load_dataset(name, 8)


def test_half_of_the_uses_are_mirrored_anew_in_each_epoch_and_by_the_seed(pair):
    data, plain = pair
    first, other = flips(data, plain), flips(data, plain, seed=1)
    assert 9 <= first.sum() <= 27 and not torch.equal(first, other)
    order = BatchOrder(12, 12, seed=0)
    epochs = [first.flatten()[12 * e : 12 * (e + 1)][order.batch(e).argsort()] for e in range(3)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_a_resumed_run_and_several_processes_mirror_the_same(pair):
    data, _ = pair
    whole = take(data)
    later = take(data, start=5, count=4, num_workers=2)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(later, whole[5:], strict=True))
    shares = [take(data, process_index=index, num_processes=2) for index in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].inputs for share in shares]), batch.inputs)


def test_the_latents_are_those_of_the_image_that_the_teacher_sees(class_folder, vae_folder):
    data, plain = (load_dataset(str(class_folder), 8, vae=str(vae_folder), random_flip=on) for on in (True, False))
    assert flips(data, plain).any()
    chances = [int(np.random.SeedSequence((0, n)).generate_state(1, np.uint64)[0]) for n in range(SIZE)]
    raw = data.collate([data.read(n, chance) for n, chance in enumerate(chances)])
    batch = data.to_batch(raw, torch.device("cpu"), torch.Generator().manual_seed(3))
    assert torch.equal(batch.images, to_unit(raw.pixels))
    moments = VAE(data.latents).encode(batch.images)
    expected = data.latents.sample_posterior(moments, torch.Generator().manual_seed(3))
    torch.testing.assert_close(batch.inputs, expected, rtol=0, atol=0)


def write_mirrored(folder, values=100):
    """vae-sd-flip beside vae-sd: the same moments, the means `values` higher."""
    for path in sorted(folder.glob("vae-sd/*/*.npy")):
        target = folder / "vae-sd-flip" / path.relative_to(folder / "vae-sd")
        target.parent.mkdir(parents=True, exist_ok=True)
        moments = np.load(path)
        moments[:4] += values
        np.save(target, moments)


def test_stored_latents_without_those_of_the_mirror_images_name_the_command_that_makes_them(repa_folder):
    with pytest.raises(UserError, match="--random-flip must be left out .* without vae-sd-flip, .* prepare --flip"):
        load_dataset(str(repa_folder), 16, random_flip=True)


@pytest.mark.parametrize("packed", [False, True])
def test_mirrored_latents_come_with_the_mirrored_image(repa_folder, packed):
    write_mirrored(repa_folder)
    root = shutil.make_archive(str(repa_folder), "zip", repa_folder) if packed else str(repa_folder)
    data, plain = load_dataset(root, 16, random_flip=True), load_dataset(root, 16)
    seen = set()
    for batch, raw in zip(take(data, count=6), take(plain, count=6), strict=True):
        taken = batch.inputs.mean(dim=(1, 2, 3)) > 9  # of means 100 higher, scaled by 0.18215
        expected = torch.where(taken[:, None, None, None], raw.images.flip(-1), raw.images)
        assert torch.equal(batch.images, expected)
        seen.update(taken.tolist())
    assert seen == {False, True}
    silent = take(data.without_images(), count=6)
    for one, two in zip(silent, take(data, count=6), strict=True):
        torch.testing.assert_close(one.inputs, two.inputs, rtol=0, atol=2)  # as mirrored; each is sampled anew
        assert one.images is None


def test_mirrored_latents_are_part_of_the_fingerprint(repa_folder):
    plain = load_dataset(str(repa_folder), 16).fingerprint()
    write_mirrored(repa_folder)
    assert load_dataset(str(repa_folder), 16).fingerprint() == plain
    before = load_dataset(str(repa_folder), 16, random_flip=True).fingerprint()
    write_mirrored(repa_folder, values=200)
    after = load_dataset(str(repa_folder), 16, random_flip=True).fingerprint()
    assert describe_change(before, after) == ["other files (6 of the 6 that are compared)"]


def test_mirrored_latents_that_are_missing_are_refused_or_skipped(repa_folder):
    write_mirrored(repa_folder)
    (repa_folder / "vae-sd-flip/00000/img-mean-std-00000002.npy").unlink()
    with pytest.raises(UserError, match="1 files have no counterpart in images, vae-sd, vae-sd-flip or dataset.json"):
        load_dataset(str(repa_folder), 16, random_flip=True)
    assert len(load_dataset(str(repa_folder), 16, random_flip=True, on_bad_file="skip")) == 5
    assert len(load_dataset(str(repa_folder), 16)) == 6
    cut_short(repa_folder / "vae-sd-flip/00000/img-mean-std-00000000.npy")
    data = load_dataset(str(repa_folder), 16, random_flip=True, on_bad_file="skip")
    with pytest.raises(BadFile, match="vae-sd-flip/.*00000000.npy is no valid .npy file"):
        data.read(0, 1)


def test_mars_cache_is_refused(tmp_path):
    (tmp_path / "cache" / "ant").mkdir(parents=True)
    moments = {name: np.zeros((32, 1, 1), np.float32) for name in ("moments", "moments_flip")}
    np.savez(tmp_path / "cache" / "ant" / "a.JPEG.npz", **moments)
    assert len(load_dataset(str(tmp_path / "cache"), 16)) == 1
    with pytest.raises(UserError, match="--random-flip must be left out for MAR's cached latents, .* mirror image"):
        load_dataset(str(tmp_path / "cache"), 16, random_flip=True)


def test_captions_are_refused_before_they_are_encoded(monkeypatch):
    monkeypatch.setitem(DATASETS, "small", f"{__name__}:small")
    few = CaptionedImages(torch.zeros(2, 1, 8, 8), [["left"], ["right"]], "an/encoder")
    monkeypatch.setitem(globals(), "small", lambda: few)
    monkeypatch.setattr(InMemoryCaptions, "of", None)
    with pytest.raises(UserError, match="--random-flip must be left out for data with captions, .* left and right"):
        load_dataset("small", 8, random_flip=True)
