from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from drawn_images import read_images, read_npz
from haste.data.images import (
    ImageArray,
    ImageFiles,
    NpzImages,
    center_crop,
    decode_image,
    image_path,
    is_image,
    open_images,
    silence_pillow,
    to_uint8,
    write_image,
    write_npz,
)
from haste.errors import BadFile, UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import photographs, pixels_of
from PIL import EpsImagePlugin, Image, PngImagePlugin


def random_images(count: int, height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_left_alone():
    (image,) = photographs(1, (16, 16))
    assert (center_crop(image, 16) == pixels_of(image)).all()


def test_twice_the_size_is_the_mean_of_each_two_by_two_block():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    means = pixels_of(image).reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.abs(center_crop(image, 16) - means).max() <= 1  # Pillow rounds rows, then columns


@pytest.mark.parametrize("size, window", [((21, 16), np.s_[:, :, 2:18]), ((16, 19), np.s_[:, 1:17, :])])
def test_the_longer_side_is_cropped_in_the_middle(size, window):
    (image,) = photographs(1, size)
    assert (center_crop(image, 16) == pixels_of(image)[window]).all()


def test_between_the_sizes_the_shorter_side_is_resized_by_bicubic_interpolation():
    (image,) = photographs(1, (60, 40))
    halved = image.resize((30, 20), Image.Resampling.BOX).resize((24, 16), Image.Resampling.BICUBIC)
    assert (center_crop(image, 16) == pixels_of(halved)[:, :, 4:20]).all()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_eight_bit_kind_of_image_becomes_rgb(mode):
    (image,) = photographs(1)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(image.convert(mode), kind), "x").mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_that_is_cut_short_anywhere_is_refused(kind):
    (image,) = photographs(1)
    data = encoded(image, kind)
    assert decode_image(data, "x").size == image.size
    for length in range(0, len(data) // 2, 7):
        with pytest.raises(BadFile, match="x is (no image|damaged|empty)"):
            decode_image(data[:length], "x")


def test_what_is_no_image_and_what_has_sixteen_bits_is_refused():
    with pytest.raises(BadFile, match="x is no image of the formats PNG, JPEG"):
        decode_image(b"not found", "x")
    with pytest.raises(BadFile, match="x must have 8 bits per channel, got pixels of type I;16"):
        decode_image(encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "PNG"), "x")


def test_endings_of_images():
    assert is_image("a/b.png") and is_image("B.JPEG") and is_image("n01_7.JPG")
    assert not is_image("labels.json") and not is_image("README") and not is_image("png")
    assert not any(map(is_image, ("a.eps", "a.ps", "a.pdf", "a.svg", "a.dds", "a.h5")))


def test_no_program_is_started_for_an_image(monkeypatch):
    """An EPS with the name of a PNG would be drawn by Ghostscript."""

    def fail(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)
    (image,) = photographs(1)
    for kind in ("EPS", "PDF", "ICO", "TGA", "DDS"):
        with pytest.raises(BadFile, match="a.png is no image of the formats PNG, JPEG, WEBP, GIF"):
            decode_image(encoded(image, kind), "a.png")


def declared(width: int, height: int) -> bytes:
    """A PNG of one pixel that says it has more."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (60_000, 60_000, "x must have at most 100,000,000 pixels .*3600000000"),
        (11_000, 10_000, "x must have at most 100,000,000 pixels, got 11000 x 10000"),
        (404, 4, "x must be at most 100 times as long as wide, got 404 x 4"),
        (4, 90_000, "x must be at most 100 times as long as wide, got 4 x 90000"),
    ],
)
def test_an_image_is_refused_by_the_size_that_it_declares(width, height, sentence):
    with pytest.raises(BadFile, match=sentence):
        decode_image(declared(width, height), "x")


def test_text_that_inflates_without_end_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 100_000_000, zip=True)
    with pytest.raises(BadFile, match="x is damaged .Decompressed data too large"):
        decode_image(encoded(photographs(1)[0], "PNG", pnginfo=info), "x")


def test_warnings_of_pillow_stay_inside():
    (image,) = photographs(1)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x1a\x01\x05\0\xff\xff\0\0\xff\xff\xff\0\x12\x01"
    data = encoded(image, "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="EXIF|Tag data"):
        Image.open(io.BytesIO(data))
    with warnings.catch_warnings(record=True) as raised:
        silence_pillow()
        decode_image(data, "x")
    assert raised == []


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.binary(max_size=12), st.floats(0, 1))
def test_any_bytes_in_an_image_are_an_image_or_a_bad_file(kind, data, where):
    whole = encoded(photographs(1)[0], kind)
    start = int(where * len(whole))
    with contextlib.suppress(BadFile):
        assert decode_image(whole[:start] + data + whole[start + len(data) :], "x").mode == "RGB"


# ---- 8-bit images and their files ----


def test_values_are_clipped_and_truncated():
    # (x + 1) / 2 · 255 = 127.5 and 254.9…: rounding would give 128 and 255.
    values = torch.tensor([-3.0, -1.0, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_sits_images_are_rounded():
    """By the formula of its sampler, in float32 as there; and the nearest of 0 … 255, up to one at the very edges."""
    x = torch.linspace(-1.2, 1.2, 4001).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    theirs = torch.clamp(127.5 * x + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    ours = to_uint8(x, rounded=True)
    assert (ours == theirs).all() and (ours != to_uint8(x)).any()
    nearest = np.rint(np.clip(127.5 * (x.double().numpy() + 1.0), 0, 255)).transpose(0, 2, 3, 1)
    assert (ours == nearest).mean() > 0.99


def test_one_channel_becomes_three_equal_ones_and_three_stay():
    grey = to_uint8(torch.rand(2, 1, 4, 4))
    assert grey.shape == (2, 4, 4, 3) and (grey[..., 0] == grey[..., 2]).all()
    colour = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert to_uint8(colour)[0, 0, 0].tolist() == [0, 127, 255]


def test_images_come_back_as_they_were_in_the_order_of_their_numbers(tmp_path):
    images = random_images(12)
    for index in reversed(range(12)):
        write_image(image_path(tmp_path, index), images[index])
    assert (read_images(tmp_path) == images).all()
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["000000.png", "000001.png"]


def test_the_npz_is_the_adm_evaluators(tmp_path):
    images, labels = random_images(5), np.arange(5)
    write_npz(tmp_path / "samples.npz", images, labels)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files[0] == "arr_0" and file["arr_0"].dtype == np.uint8
    read, read_labels = read_npz(tmp_path / "samples.npz")
    assert (read == images).all() and (read_labels == labels).all()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]  # no leftovers


def test_the_npz_is_written_image_by_image(tmp_path):
    """All of them are never in memory together."""
    one = random_images(1, 64, 64)[0]
    count = 400
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", (one for _ in range(count)), np.zeros(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    images = read_npz(tmp_path / "samples.npz")[0]
    assert images.shape == (count, 64, 64, 3) and (images == one).all()
    assert peak < 0.2 * images.nbytes


def test_an_npz_of_images_that_do_not_fit_together_is_not_written(tmp_path):
    with pytest.raises(UserError, match="s.npz"):
        write_npz(tmp_path / "s.npz", [*random_images(1), *random_images(1, 9, 9)], np.zeros(2))
    with pytest.raises(ValueError, match="shorter"):
        write_npz(tmp_path / "s.npz", random_images(2), np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_an_npz_of_somebody_else_has_no_labels(tmp_path):
    np.savez(tmp_path / "foreign.npz", random_images(3))
    assert read_npz(tmp_path / "foreign.npz")[1] is None


# ---- sets of images ----


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
    with pytest.raises(UserError, match="--samples must be .*nowhere, which does not exist"):
        open_images(tmp_path / "nowhere", "--samples")
    with pytest.raises(UserError, match="--reference must hold images"):
        open_images(tmp_path, "--reference")
    (tmp_path / "features.npy").touch()
    with pytest.raises(UserError, match="--samples must be a folder, a .zip or an .npz of images, got .*features.npy"):
        open_images(tmp_path / "features.npy", "--samples")
    for name, size in (("a.png", (8, 8)), ("b.png", (9, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(UserError, match=r"must hold images of one size, got 8 x 8 and 9 x 8 \(b.png\)"):
        list(open_images(tmp_path, "--samples").batches(2))
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(UserError, match="b.png is no image .*; replace it"):
        list(open_images(tmp_path, "--samples").batches(2))


def test_npz_files_of_other_content_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    path.write_text("no zip at all")
    with pytest.raises(UserError, match="must be an .npz with images under arr_0"):
        NpzImages(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="must be an .npz with images under arr_0"):
        NpzImages(path)
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        np.savez(path, wrong)
        with pytest.raises(UserError, match="must be uint8"):
            NpzImages(path)
