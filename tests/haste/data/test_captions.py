"""Images with features of captions as --data-dir: REPA's layout, the compact one, and small sets in memory."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BadFile, BatchOrder, batches, load_dataset
from haste.data.captions import open_captions
from haste.data.dataset import describe_change
from haste.data.shards import shard_path, write_shard
from haste.errors import UserError
from haste.registry import DATASETS
from haste.text import CLIP_L, TextEncoder, TextFormat
from haste.vae import SD_LATENTS
from image_files import captions_of, cut_short, photographs, pixels_of, save_vae
from safetensors.numpy import load_file
from text_files import save_text_encoder

CPU = torch.device("cpu")
COUNT, SIDE = 6, 16  # images of 16 x 16 pixels with latents of 2 x 2
TEXT = TextFormat("an/encoder", 5, 7)


def features_of(caption: str) -> np.ndarray:
    """Any function of the text that float16 has exactly."""
    return np.full(TEXT.shape, sum(caption.encode()) % 997 / 8, dtype=np.float32)


def moments_of(index: int) -> np.ndarray:
    return np.concatenate([np.full((4, 2, 2), index), np.full((4, 2, 2), -0.5 * index)]).astype(np.float32)


def write_repa(root: Path, **record) -> Path:
    """REPA's layout, without a record unless values are given."""
    folder = root / "train"
    folder.mkdir(parents=True)
    np.save(root / "empty_context.npy", features_of(""))
    for index, image in enumerate(photographs(COUNT, (SIDE, SIDE))):
        image.save(folder / f"{index}.png")
        np.save(folder / f"{index}.npy", moments_of(index))
        for n, caption in enumerate(captions_of(index)):
            np.save(folder / f"{index}_{n}.npy", features_of(caption))
    if record:
        sentences = [[index, captions_of(index)] for index in range(COUNT)]
        (folder / "captions.json").write_text(json.dumps({"captions": sentences}))
        (folder / "prepare.json").write_text(json.dumps({"finished": True, **record}))
    return folder


def write_shards(root: Path, size: int = 4, **record) -> Path:
    """The compact layout of the same data."""
    rows: dict[str, int] = {}
    of_images = [[rows.setdefault(text, len(rows)) for text in captions_of(index)] for index in range(COUNT)]
    texts = list(rows)
    root.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(texts), size)):
        part = [text.encode() for text in texts[start : start + size]]
        write_shard(shard_path(root, "captions", number), {
            "features": np.stack([features_of(text.decode()) for text in part]).astype(np.float16),
            "text": np.frombuffer(b"".join(part), np.uint8), "ends": np.cumsum([len(text) for text in part]),
        })  # fmt: skip
    images = [pixels_of(image) for image in photographs(COUNT, (SIDE, SIDE))]
    for number, start in enumerate(range(0, COUNT, size)):
        numbers = range(start, min(start + size, COUNT))
        write_shard(shard_path(root, "images", number), {
            "number": np.array(numbers), "pixels": np.stack([images[index] for index in numbers]),
            "moments": np.stack([moments_of(index) for index in numbers]),
            "captions": np.array([row for index in numbers for row in of_images[index]]),
            "ends": np.cumsum([len(of_images[index]) for index in numbers]),
        })  # fmt: skip
    np.save(root / "empty_context.npy", features_of(""))
    values = {"layout": "shards", "latents": asdict(SD_LATENTS), "text": asdict(TEXT), "finished": True, "source": "x"}
    values |= {"images": COUNT, "captions": len(texts), "per_shard": {"images": size, "captions": size}}
    (root / "prepare.json").write_text(json.dumps(values | record))
    return root


def write(layout: str, root: Path, **record) -> Path:
    if layout == "shards":
        return write_shards(root, **record)
    return write_repa(root, latents=asdict(SD_LATENTS), text=asdict(TEXT), **record)


@pytest.fixture(params=["repa", "shards"])
def folder(request, tmp_path) -> Path:
    return write(request.param, tmp_path / request.param)


def everything(data):
    return data.collate([data[index] for index in range(len(data))])


# ---- both layouts ----


def test_images_moments_and_captions_belong_together(folder):
    data = load_dataset(str(folder), SIDE)
    assert (len(data), data.channels, data.input_size, data.resolution) == (COUNT, 4, 2, SIDE)
    assert data.text == TEXT and data.latents == SD_LATENTS
    assert torch.equal(data.null, torch.from_numpy(features_of("")))
    for index, image in enumerate(photographs(COUNT, (SIDE, SIDE))):
        for choice, caption in enumerate(captions_of(index)):
            sample = data.read(index, choice + len(captions_of(index)) * 12345)
            assert (sample.pixels.numpy() == pixels_of(image)).all()
            assert (sample.moments.numpy() == moments_of(index)).all()
            assert (sample.features.numpy() == features_of(caption)).all()


def test_latents_are_sampled_from_mean_and_log_variance(folder):
    data = load_dataset(str(folder), SIDE)
    raw = everything(data)
    batch = data.to_batch(raw, CPU, torch.Generator().manual_seed(3))
    noise = torch.randn(COUNT, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    index = torch.arange(COUNT).view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.inputs, (index + torch.exp(0.5 * -0.5 * index) * noise) * 0.18215)
    assert batch.condition.dtype == torch.float32 and batch.condition.shape == (COUNT, *TEXT.shape)
    assert batch.images.shape == (COUNT, 3, SIDE, SIDE) and -1 <= batch.images.min() < batch.images.max() <= 1


def test_log_variances_are_clipped(tmp_path):
    folder = write_repa(tmp_path, latents=asdict(SD_LATENTS), text=asdict(TEXT))
    for logvar, deviation in [(-100.0, np.exp(-15.0)), (100.0, np.exp(10.0))]:
        np.save(folder / "0.npy", np.concatenate([np.zeros((4, 2, 2)), np.full((4, 2, 2), logvar)]))
        data = load_dataset(str(folder), SIDE)
        found = data.to_batch(data.collate([data[0]]), CPU, torch.Generator().manual_seed(0)).inputs
        noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found, (0.18215 * deviation * noise).float())


def test_each_use_of_an_image_has_one_of_its_captions_by_chance(folder):
    data = load_dataset(str(folder), SIDE)

    def first_features(seed, workers=0, start=0):
        stream = batches(data, BatchOrder(COUNT, COUNT, seed=seed), start, num_workers=workers)
        return [next(stream).condition for _ in range(20)]

    found = first_features(0)
    seen = {features.flatten()[0].item() for batch in found for features in batch}
    assert seen == {features_of(caption).flat[0] for index in range(COUNT) for caption in captions_of(index)}
    again, later = first_features(0, workers=2), first_features(0, start=7)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[7:], later, strict=False))
    assert not all(torch.equal(a, b) for a, b in zip(found, first_features(1), strict=True))


def test_without_images_none_is_read(folder):
    silent = load_dataset(str(folder), SIDE).without_images()
    for path in folder.glob("*.png"):
        path.unlink()
    batch = next(batches(silent, BatchOrder(COUNT, COUNT, seed=0), num_workers=1))
    assert batch.images is None and batch.inputs.shape == (COUNT, 4, 2, 2)


def test_captions_for_samples_are_spread_over_the_images(folder):
    data = load_dataset(str(folder), SIDE)
    features, titles = data.examples(3)
    assert titles == [captions_of(index)[0] for index in (0, 2, 4)]
    assert (features.numpy() == np.stack([features_of(title) for title in titles])).all()
    assert data.captions(64) == [captions_of(index)[0] for index in range(COUNT)]
    assert len(data.examples(10)[1]) == 10


def test_open_captions_gives_texts_and_features_in_order(folder):
    captions = open_captions(folder)
    assert len(captions) == COUNT and captions.text == TEXT
    for index in range(COUNT):
        assert captions.count(index) == len(captions_of(index))
        for choice in range(5):
            text, features = captions.caption(index, choice)
            assert text == captions_of(index)[choice % captions.count(index)]
            assert (features.numpy() == features_of(text)).all() and features.dtype == torch.float32
    with pytest.raises(UserError, match="--prompts must be a folder with features of captions"):
        (folder.parent / "other").mkdir()
        open_captions(folder.parent / "other")


def test_the_fingerprint_knows_other_data(folder, tmp_path):
    before = load_dataset(str(folder), SIDE).fingerprint()
    assert before["images"] == COUNT
    moved = folder.rename(tmp_path / "moved")
    if not (moved / "empty_context.npy").exists():
        shutil.copy(tmp_path / "repa" / "empty_context.npy", moved)
    assert load_dataset(str(moved), SIDE).fingerprint() == before
    pickled = pickle.loads(pickle.dumps(load_dataset(str(moved), SIDE)))
    assert pickled.fingerprint() == before
    if (moved / "0_0.npy").exists():
        np.save(moved / "0_0.npy", features_of("other"))
    else:
        write_shards(moved, source="y")
    assert load_dataset(str(moved), SIDE).fingerprint() != before


@pytest.mark.parametrize("other", ["moments", "features"])
def test_the_fingerprint_of_shards_knows_another_vae_and_another_encoder(tmp_path, monkeypatch, other):
    before = load_dataset(str(write_shards(tmp_path / "one")), SIDE).fingerprint()
    original = globals()[f"{other}_of"]
    monkeypatch.setitem(globals(), f"{other}_of", lambda of: original(of) + 1)
    after = load_dataset(str(write_shards(tmp_path / "two")), SIDE).fingerprint()
    (change,) = describe_change(before, after)
    assert change.startswith("other files")


def test_settings_that_do_not_fit_are_refused(folder):
    with pytest.raises(UserError, match="--num-classes must be left out"):
        load_dataset(str(folder), SIDE, num_classes=10)
    with pytest.raises(UserError, match="must have an image of 32 x 32 pixels, as --resolution, got 16 x 16"):
        load_dataset(str(folder), 32)
    with pytest.raises(UserError, match="--image-dir must come with MAR's cached latents"):
        load_dataset(str(folder), SIDE, image_dir="x")


def test_the_vae_and_its_statistics_may_be_given(folder, tmp_path):
    torch.save({"mean": torch.ones(4), "std": torch.full((4,), 2.0)}, tmp_path / "stats.pt")
    assert load_dataset(str(folder), SIDE, vae_stats=str(tmp_path / "stats.pt")).latents.scale == (0.5,) * 4
    with pytest.raises(UserError, match="--vae must have the latents of"):
        load_dataset(str(folder), SIDE, vae=str(save_vae(tmp_path / "vae")))


def test_data_that_is_not_finished_is_refused(folder):
    record = json.loads((folder / "prepare.json").read_text())
    (folder / "prepare.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(UserError, match="--data-dir must be finished by haste prepare --captions"):
        load_dataset(str(folder), SIDE)


def test_features_of_another_width_than_recorded_are_refused(folder):
    record = json.loads((folder / "prepare.json").read_text())
    (folder / "prepare.json").write_text(json.dumps({**record, "text": {**record["text"], "width": 9}}))
    with pytest.raises(UserError, match="empty_context.npy must hold numbers of 5 x 9, as in prepare.json, got 5 x 7"):
        load_dataset(str(folder), SIDE)
    place = next(path for path in (folder, folder.parent) if (path / "empty_context.npy").exists())
    np.save(place / "empty_context.npy", np.zeros((5, 9)))
    with pytest.raises(UserError, match="must hold .*5 x 9.* got 5 x 7; replace it"):
        load_dataset(str(folder), SIDE)
    (place / "empty_context.npy").unlink()
    with pytest.raises(UserError, match="--data-dir must have the features of the empty caption"):
        load_dataset(str(folder), SIDE)


# ---- REPA's layout ----


def test_public_features_have_no_record(tmp_path):
    folder = write_repa(tmp_path)
    data = load_dataset(str(folder), SIDE)
    assert data.text == TextFormat("", *TEXT.shape) and data.captions(64) is None
    assert data.latents.vae == "stabilityai/sd-vae-ft-ema" and data.latents.scale == (0.18215,) * 4
    assert data.examples(2)[1] == ["caption 0", "caption 1"]
    assert open_captions(folder).caption(0, 0)[0] is None
    for path in tmp_path.rglob("*_*.npy"):
        np.save(path, np.zeros((77, 768), dtype=np.float16))
    assert load_dataset(str(folder), SIDE).text == CLIP_L


def test_the_folder_above_is_named(tmp_path):
    write_repa(tmp_path)
    with pytest.raises(UserError, match="--data-dir must be one of the folders train in"):
        load_dataset(str(tmp_path), SIDE)


def test_a_zip_holds_the_same(tmp_path):
    folder = write_repa(tmp_path)
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    a, b = everything(load_dataset(str(folder), SIDE)), everything(load_dataset(packed, SIDE))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_features_without_images_serve_no_teacher(tmp_path):
    folder = write_repa(tmp_path)
    for path in folder.glob("*.png"):
        path.unlink()
    data = load_dataset(str(folder), SIDE)
    assert data.to_batch(everything(data), CPU).images is None
    with pytest.raises(UserError, match="--data-dir must have N.png beside N.npy for the teacher"):
        data.require_images()


@pytest.mark.parametrize("name", ["2.png", "2.npy", "2_1.npy", "2_0.npy"])
def test_missing_files_are_refused_or_their_image_is_skipped(tmp_path, name):
    folder = write_repa(tmp_path)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"1 files of .*train are missing, the first being .*{name}; restore"):
        load_dataset(str(folder), SIDE)
    data = load_dataset(str(folder), SIDE, on_bad_file="skip")
    assert data.store.name(2).endswith("3.npy") and len(data) == COUNT - 1


@pytest.mark.parametrize("name", ["x.npy", "01.npy", "2_1_0.npy", "cat.png"])
def test_files_that_do_not_belong_are_refused_or_skipped(tmp_path, name):
    folder = write_repa(tmp_path)
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"1 files of .* are not of the form N.png, N.npy or N_i.npy.*{name}"):
        load_dataset(str(folder), SIDE)
    assert len(load_dataset(str(folder), SIDE, on_bad_file="skip")) == COUNT


def test_damaged_features_are_refused_or_skipped(tmp_path):
    folder = write_repa(tmp_path)
    data, refusing = load_dataset(str(folder), SIDE, on_bad_file="skip"), load_dataset(str(folder), SIDE)
    cut_short(folder / "1_0.npy")
    np.save(folder / "1_1.npy", np.full(TEXT.shape, np.nan))
    for choice in range(2):
        with pytest.raises(BadFile, match=f"1_{choice}.npy"):
            refusing.read(1, choice)
    batch = next(batches(data, BatchOrder(COUNT, COUNT, seed=0)))
    assert len(batch.inputs) == COUNT and len(data.skipped) == 1
    with pytest.raises(UserError, match="1_.*--on-bad-file skip"):
        next(batches(refusing, BatchOrder(COUNT, COUNT, seed=0)))


@pytest.mark.parametrize(
    "content", ["{}", '{"captions": 3}', '{"captions": [[0, ["one"]]]}', '{"captions": [["x", 1]]}']
)
def test_captions_that_do_not_match_the_features_are_refused(tmp_path, content):
    folder = write("repa", tmp_path)
    (folder / "captions.json").write_text(content)
    with pytest.raises(UserError, match="captions.json must"):
        load_dataset(str(folder), SIDE)


def test_a_caption_whose_features_are_missing_is_refused(tmp_path):
    folder = write("repa", tmp_path)
    (folder / f"1_{len(captions_of(1)) - 1}.npy").unlink()
    with pytest.raises(UserError, match="captions.json must"):
        load_dataset(str(folder), SIDE)


# ---- the compact layout ----


@pytest.mark.parametrize("kind", ["images", "captions"])
def test_missing_and_extra_shards_are_refused(tmp_path, kind):
    folder = write_shards(tmp_path)
    first = shard_path(folder, kind, 0)
    first.rename(shard_path(folder, kind, 9))
    with pytest.raises(UserError, match=f"1 shards of .* are missing, the first being .*{first.name}; restore"):
        load_dataset(str(folder), SIDE)
    shutil.copy(shard_path(folder, kind, 9), first)
    with pytest.raises(UserError, match=f"1 shards in .* are not among those of prepare.json.*{kind}-00009.*; remove"):
        load_dataset(str(folder), SIDE)
    assert len(load_dataset(str(folder), SIDE, on_bad_file="skip")) == COUNT


def test_damaged_shards_are_refused_or_their_images_skipped(tmp_path, caplog):
    folder = write_shards(tmp_path)
    cut_short(shard_path(folder, "images", 0))
    with pytest.raises(UserError, match="images-00000.safetensors has no readable ends.*--on-bad-file skip"):
        load_dataset(str(folder), SIDE)
    data = load_dataset(str(folder), SIDE, on_bad_file="skip")
    assert len(data) == 2 and "skipped: " in caplog.text
    assert (data[0].moments.numpy() == moments_of(4)).all()
    write_shards(tmp_path)
    data = load_dataset(str(folder), SIDE)
    cut_short(shard_path(folder, "captions", 0))
    fresh = pickle.loads(pickle.dumps(data))
    with pytest.raises(BadFile, match="captions-00000.safetensors"):
        fresh[0]


def test_shards_whose_captions_do_not_match_are_refused(tmp_path):
    folder = write_shards(tmp_path)
    for change, sentence in [
        ({"captions": 5}, "must have captions from 0 to 4"),
        ({"per_shard": {"images": 0, "captions": 4}}, "per_shard of .* must be numbers from 1"),
        ({"images": "many"}, "images of .*prepare.json must be an integer"),
    ]:
        write_shards(folder, **change)
        with pytest.raises(UserError, match=sentence):
            load_dataset(str(folder), SIDE)


def test_shards_without_latents_are_trained_on_as_pixels_or_encoded_on_the_fly(tmp_path, vae_folder):
    folder = write_shards(tmp_path / "data", latents=None)
    for number in range(2):
        path = shard_path(folder, "images", number)
        write_shard(path, {name: array for name, array in load_file(path).items() if name != "moments"})
    data = load_dataset(str(folder), SIDE)
    batch = data.to_batch(everything(data), CPU)
    assert data.latents is None and batch.inputs is batch.images and batch.inputs.shape == (COUNT, 3, SIDE, SIDE)
    assert data.without_images().to_batch(everything(data.without_images()), CPU).inputs.shape == batch.inputs.shape
    encoded = load_dataset(str(folder), SIDE, vae=str(vae_folder))
    for kind in (encoded, encoded.without_images()):  # as after the end of alignment
        assert kind.to_batch(everything(kind), CPU).inputs.shape == (COUNT, 4, 4, 4)


# ---- in memory ----

PLUGIN = """
import torch
from haste.data.captions import CaptionedImages
def load(cache):
    assert cache is None or cache.is_dir()
    return CaptionedImages(torch.zeros(3, 1, 4, 4), {captions}, {encoder!r})
"""


def open_toys(tmp_path, monkeypatch, captions, cache=None):
    encoder = save_text_encoder(tmp_path / "clip")
    (tmp_path / "toys.py").write_text(PLUGIN.format(captions=captions, encoder=str(encoder)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DATASETS, "toys", "toys:load")
    monkeypatch.delitem(__import__("sys").modules, "toys", raising=False)
    return encoder, load_dataset("toys", 4, cache=cache)


def test_a_small_set_with_captions_from_elsewhere(tmp_path, monkeypatch):
    captions = [["a red temple", "the red temple"], ["a flower"], ["the red temple"]]
    folder, data = open_toys(tmp_path, monkeypatch, captions, cache=tmp_path)
    encoder = TextEncoder(TextFormat.of(str(folder)))
    assert (len(data), data.channels, data.text) == (3, 1, encoder.text)
    torch.testing.assert_close(data.null, encoder.encode([""])[0])
    batch = next(batches(data, BatchOrder(3, 3, seed=0)))
    assert batch.condition.shape == (3, *encoder.text.shape) and batch.inputs is batch.images
    for index, texts in enumerate(captions):
        for choice, text in enumerate(texts):
            raw = data.collate([data.read(index, choice + len(texts))])
            torch.testing.assert_close(data.to_batch(raw, CPU).condition, encoder.encode([text]))
    features, titles = data.examples(3)
    assert titles == data.captions(9) == ["a red temple", "a flower", "the red temple"]
    torch.testing.assert_close(features, encoder.encode(titles))
    assert data.fingerprint() != open_toys(tmp_path, monkeypatch, [["a"], ["b"], ["c"]])[1].fingerprint()


def test_an_image_without_a_caption_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--data-dir must have a caption for each of its 3 images, got 2"):
        open_toys(tmp_path, monkeypatch, [["a"], [], ["b"]])
