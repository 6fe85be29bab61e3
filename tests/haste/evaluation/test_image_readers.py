from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from haste.data.images import write_image, write_npz
from haste.errors import UserError
from haste.evaluation.image_readers import ImageArray, ImageFiles, NpzImages, open_images
from PIL import Image


def random_images(count: int, height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(params=["folder", "zip", "npz", "packed npz", "memory"])
def images(request, tmp_path):
    """11 images as every kind of set."""
    pixels = random_images(11)
    if request.param == "memory":
        return ImageArray(pixels)
    if request.param == "npz":
        write_npz(tmp_path / "set.npz", pixels, np.arange(11))
        return open_images(tmp_path / "set.npz", "--samples")
    if request.param == "packed npz":
        np.savez_compressed(tmp_path / "set.npz", arr_0=pixels)
        return open_images(tmp_path / "set.npz", "--samples")
    for index, image in enumerate(pixels):
        write_image(tmp_path / "set" / f"{index:06d}.png", image)
    (tmp_path / "set" / "sample.json").write_text("{}")  # no image
    if request.param == "folder":
        return open_images(tmp_path / "set", "--samples")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").iterdir():
            archive.write(path, path.name)
    return open_images(tmp_path / "set.zip", "--samples")


def test_batches_are_the_images_in_order(images):
    pixels = random_images(11)
    assert len(images) == 11 and images.shape == (8, 6, 3)
    batches = list(images.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert (np.concatenate(batches) == pixels).all()
    some = np.concatenate(list(images.batches(2, start=3, stop=8)))
    assert some.dtype == np.uint8 and (some == pixels[3:8]).all()


def test_the_first_of_a_set_can_be_had_alone(tmp_path):
    pixels = random_images(5)
    write_npz(tmp_path / "set.npz", pixels, np.arange(5))
    for index, image in enumerate(pixels):
        write_image(tmp_path / "set" / f"{index:06d}.png", image)
    for name in ("set", "set.npz"):
        first = open_images(tmp_path / name, "--samples", count=3)
        assert len(first) == 3 and (np.concatenate(list(first.batches(2))) == pixels[:3]).all()
    assert open_images(tmp_path / "set.npz", "--samples", count=3).labels.tolist() == [0, 1, 2]
    assert len(open_images(tmp_path / "set", "--samples", count=9)) == 5


def test_the_digest_tells_which_images(images):
    assert images.digest() == images.digest()
    assert len({images.digest(), images.digest(0, 5), images.digest(5, 11)}) == 3


def test_the_digest_changes_with_an_image(tmp_path):
    for index, image in enumerate(random_images(4)):
        write_image(tmp_path / f"{index}.png", image)
    before = ImageFiles(tmp_path, "--samples")
    first, second = before.digest(0, 2), before.digest(2, 4)
    write_image(tmp_path / "3.png", random_images(1)[0])
    os.utime(tmp_path / "3.png", ns=(1, 1))
    after = ImageFiles(tmp_path, "--samples")
    assert after.digest(0, 2) == first and after.digest(2, 4) != second


def test_numbers_are_read_off_the_names(tmp_path):
    for name in ("000007.png", "000010.png"):
        write_image(tmp_path / name, random_images(1)[0])
    assert ImageFiles(tmp_path, "--samples").numbers() == [7, 10]
    write_image(tmp_path / "cat.png", random_images(1)[0])
    assert ImageFiles(tmp_path, "--samples").numbers() is None


def test_jpegs_in_folders_and_grey_ones_are_read_as_colour(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (6, 8), 200).save(tmp_path / "a" / "grey.jpg")
    Image.new("RGB", (6, 8)).save(tmp_path / "b.JPEG")
    files = ImageFiles(tmp_path, "--reference")
    assert files.names == ["a/grey.jpg", "b.JPEG"] and files.shape == (8, 6, 3)
    assert np.unique(next(files.batches(2))).tolist() == [0, 200]


def test_sets_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="--samples is .*nowhere, which does not exist"):
        open_images(tmp_path / "nowhere", "--samples")
    with pytest.raises(UserError, match="--reference is .*, which holds no images"):
        open_images(tmp_path, "--reference")
    (tmp_path / "features.npy").touch()
    with pytest.raises(UserError, match="features.npy; images must be in a folder, a .zip or an .npz"):
        open_images(tmp_path / "features.npy", "--samples")
    for name, size in (("a.png", (8, 8)), ("b.png", (9, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(UserError, match=r"different sizes, 8 x 8 and 9 x 8 \(b.png\); they must all be alike"):
        list(open_images(tmp_path, "--samples").batches(2))
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(UserError, match="b.png is no image, .*; replace it"):
        list(open_images(tmp_path, "--samples").batches(2))


def test_npz_files_of_other_content_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    path.write_text("no zip at all")
    with pytest.raises(UserError, match="not an .npz with images under arr_0"):
        NpzImages(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="not an .npz with images under arr_0"):
        NpzImages(path)
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        np.savez(path, wrong)
        with pytest.raises(UserError, match="it must be uint8"):
            NpzImages(path)
