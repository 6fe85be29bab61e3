"""webdataset's tars of images with labels as --data-dir and --source."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.data import BatchOrder, batches, load_dataset
from haste.data.labelled_tars import open_labelled_tars
from haste.data.prepare import Destination
from haste.data.sources import open_source
from haste.data.tars import find_tars
from haste.errors import BadFile, UserError
from image_files import photographs, write_pairs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where the indexes are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "haste" / "tars"


def encoded(index: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    photographs(index + 1)[index].save(file, format=kind)
    return file.getvalue()


def label_of(index: int) -> int:
    return (3 * index) % 4


def members_of(index: int, label: str) -> dict[str, bytes]:
    """An image, its label, and files that are not for training."""
    content = str(label_of(index)) if label == "cls" else json.dumps({"label": label_of(index), "name": "x"})
    return {"jpg": encoded(index), label: content.encode(), "seg.png": b"another image", "txt": b"a caption"}


def write_labelled(folder: Path, count: int = 6, per_tar: int = 4, label: str = "cls", **changes) -> Path:
    """00000.tar, ... with KEY.jpg and KEY.cls or KEY.json; `changes` are other members of the image of a number."""
    folder.mkdir(exist_ok=True)
    for start in range(0, count, per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w") as tar:
            for index in range(start, min(start + per_tar, count)):
                members = members_of(index, label)
                if label == "json":
                    del members["txt"]
                for suffix, data in {**members, **changes.get(f"of_{index}", {})}.items():
                    if data is not None:
                        info = tarfile.TarInfo(f"./n{index:04d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize(("suffix", "label"), [("CLS", b"1"), ("cls", b"001"), ("cls", b"1\n")])
def test_labels_are_read_as_webdataset_reads_them(tmp_path, suffix, label):
    folder = write_labelled(tmp_path / "tars", of_1={"cls": None, suffix: label})
    assert open_source(folder, "--data-dir").labels[1] == 1


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("of_one", [False, True])
def test_images_with_labels(tmp_path, label, of_one):
    path = write_labelled(tmp_path / "tars", per_tar=6 if of_one else 4, label=label)
    path = path / "00000.tar" if of_one else path
    data = load_dataset(str(path), 16)
    assert (len(data), data.num_classes, data.input_size, data.channels) == (6, 4, 16, 3)
    for source in (data.source, open_source(path, "--source"), pickle.loads(pickle.dumps(data.source))):
        assert source.labels.tolist() == [label_of(index) for index in range(6)]
        assert [source.read(index) for index in range(6)] == [encoded(index) for index in range(6)]
    order = BatchOrder(6, 6, seed=0)
    batch = next(batches(data, order, num_workers=2))
    assert batch.condition.tolist() == [label_of(index) for index in order.batch(0).tolist()]


def test_the_index_is_kept_until_a_tar_changes(tmp_path, cache, monkeypatch):
    folder = write_labelled(tmp_path / "tars")
    first = open_source(folder, "--data-dir")
    scan, scans = tarfile.open, []
    monkeypatch.setattr(tarfile, "open", lambda *args, **more: scans.append(args) or scan(*args, **more))
    again = open_source(folder, "--data-dir")
    assert not scans and len(list(cache.iterdir())) == 1
    assert again.digest() == first.digest() and np.array_equal(again.labels, first.labels)
    assert [again.read(index) for index in range(6)] == [first.read(index) for index in range(6)]
    os.utime(folder / "00001.tar", ns=(1, 1))
    assert open_source(folder, "--data-dir").digest() == first.digest() and len(scans) == 2
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    assert open_source(folder, "--data-dir").digest() == first.digest() and len(scans) == 4
    path = next(path for path in cache.iterdir() if path.stat().st_size > 100)
    with np.load(path) as arrays:
        wrong = {**arrays, "places": arrays["places"] + 5}
    np.savez(path, **wrong)
    assert open_source(folder, "--data-dir").digest() == first.digest()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(write_labelled(tmp_path / "tars"), "--data-dir")) == 6


def test_the_fingerprint_knows_the_content_and_not_the_place(tmp_path):
    folder = write_labelled(tmp_path / "tars")
    before = load_dataset(str(folder), 16).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    assert load_dataset(str(moved), 16).fingerprint() == before
    write_labelled(moved, of_2={"jpg": encoded(9)})
    after = load_dataset(str(moved), 16).fingerprint()
    assert after["names"] == before["names"] and after["files"] != before["files"]


def test_images_are_prepared_from_tars(tmp_path):
    source = open_source(write_labelled(tmp_path / "tars"), "--source")
    settings = Destination(tmp_path / "out", source, 8, None).settings
    assert settings["images"] == 6 and settings["source"] == source.digest()


def test_tars_without_labels_are_one_class(tmp_path):
    without = {f"of_{index}": {"cls": None, "txt": None} for index in range(6)}
    data = load_dataset(str(write_labelled(tmp_path / "tars", **without)), 16)
    assert data.num_classes == 1 and data.source.labels is None
    assert len(load_dataset(str(tmp_path / "tars"), 16)) == 6  # from the index


def test_random_flips_and_pixels_are_as_of_files(tmp_path):
    path = write_labelled(tmp_path / "tars")
    data, plain = load_dataset(str(path), 16, random_flip=True), load_dataset(str(path), 16)
    assert torch.equal(data.read(2, 1).pixels, plain[2].pixels.flip(-1))


def test_images_beside_tars_are_read(tmp_path, caplog):
    write_labelled(tmp_path / "both")
    for index, image in enumerate(photographs(3)):
        image.save(tmp_path / "both" / f"{index}.png")
    assert len(open_source(tmp_path / "both", "--data-dir")) == 3
    assert "and not its 2 tars" in caplog.text


# ---- faults ----

FAULTS = {
    "no number": ({"cls": b"cat"}, "n0001.cls must hold the number of a class"),
    "negative": ({"cls": b"-1"}, "n0001.cls must hold a class from 0 to"),
    "float": ({"cls": b"1.5"}, "n0001.cls must hold the number of a class"),
    "empty": ({"cls": b""}, "n0001.cls must hold the number of a class"),
    "no label": ({"cls": None}, "1 images or labels have no counterpart, .*n0001.jpg"),
    "no image": ({"jpg": None}, "1 images or labels have no counterpart, .*n0001.cls"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_labels_that_cannot_be_used_are_refused_or_skipped(tmp_path, cache, fault):
    members, sentence = FAULTS[fault]
    folder = write_labelled(tmp_path / "tars", of_1=members)
    with pytest.raises(UserError, match=sentence):
        open_source(folder, "--data-dir")
    source = open_source(folder, "--data-dir", "skip")
    assert source.labels.tolist() == [label_of(index) for index in (0, 2, 3, 4, 5)]
    assert not cache.exists()  # so that the next command names the fault again
    with pytest.raises(UserError, match=sentence):
        open_source(folder, "--data-dir")


def test_json_without_a_label_is_refused(tmp_path):
    folder = write_labelled(tmp_path / "tars", label="json", of_1={"json": b'{"caption": "x"}'})
    with pytest.raises(UserError, match='n0001.json must be JSON with a "label"'):
        open_source(folder, "--data-dir")


def test_damaged_tars_are_refused_or_read_as_far_as_they_go(tmp_path, cache):
    folder = write_labelled(tmp_path / "tars")
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match="00001.tar is no whole, uncompressed tar"):
        open_source(folder, "--data-dir")
    assert len(open_source(folder, "--data-dir", "skip")) == 4 and not cache.exists()


def test_a_tar_that_is_cut_short_later_gives_bad_files(tmp_path):
    folder = write_labelled(tmp_path / "tars")
    source = open_source(folder, "--data-dir")
    (folder / "00001.tar").write_bytes(b"")
    with pytest.raises(BadFile, match=r"00001.tar/n0004.jpg is truncated"):
        source.read(4)


def test_captions_alone_name_the_command_for_them(tmp_path):
    with pytest.raises(UserError, match="--data-dir must have a .cls .* haste prepare --captions"):
        open_source(write_labelled(tmp_path / "t", **{f"of_{n}": {"cls": None} for n in range(6)}), "--data-dir")


def test_two_images_of_a_key_and_tars_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data-dir must have one image of each key, got .*n0001.jpg and .*n0001.png"):
        open_source(write_labelled(tmp_path / "tars", of_1={"png": encoded(1, "PNG")}), "--data-dir")
    none = {f"of_{index}": {"jpg": None} for index in range(6)}
    with pytest.raises(UserError, match="--data-dir must hold tars of images, got none"):
        open_source(write_labelled(tmp_path / "none", **none), "--data-dir")


def test_settings_of_other_data_are_refused(tmp_path):
    tar = str(write_labelled(tmp_path / "tars") / "00000.tar")
    for name in ("latents_dir", "image_dir"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be left out with a tar of images"):
            load_dataset(tar, 16, **{name: "x"})
    with pytest.raises(UserError, match="--vae-stats must come with --vae"):
        load_dataset(tar, 16, vae_stats="x")


def test_tars_of_one_folder_are_found(tmp_path):
    write_pairs(tmp_path / "pairs")
    assert find_tars(tmp_path / "pairs") == []
    source = open_labelled_tars(find_tars(write_labelled(tmp_path / "tars")), "--data-dir")
    assert source.name(5).endswith("tars/00001.tar/n0005.jpg")
