import contextlib
import io
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from haste.data.images import center_crop, decode_image, is_image, silence_pillow
from haste.errors import BadFile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import photographs, pixels_of
from PIL import EpsImagePlugin, Image, PngImagePlugin


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
        with pytest.raises(BadFile, match="x is (no image|no whole image|empty)"):
            decode_image(data[:length], "x")


def test_what_is_no_image_and_what_has_sixteen_bits_is_refused():
    with pytest.raises(BadFile, match="x is no image, or of another format than PNG, JPEG"):
        decode_image(b"not found", "x")
    with pytest.raises(BadFile, match="x has pixels of type I;16; they must have 8 bits a channel"):
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
        with pytest.raises(BadFile, match="a.png is no image, or of another format than PNG, JPEG, WEBP, GIF"):
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
        (60_000, 60_000, "x has 3,600,000,000 pixels; at most 100,000,000 are read"),
        (11_000, 10_000, "x has 11000 x 10000 pixels; at most 100,000,000 are read"),
        (404, 4, "x has 404 x 4 pixels; the longer side must be at most 100 times the shorter"),
        (4, 90_000, "x has 4 x 90000 pixels; the longer side must be at most 100 times the shorter"),
    ],
)
def test_an_image_is_refused_by_the_size_that_it_declares(width, height, sentence):
    with pytest.raises(BadFile, match=sentence):
        decode_image(declared(width, height), "x")


def test_text_that_inflates_without_end_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 100_000_000, zip=True)
    with pytest.raises(BadFile, match="x is no whole image .Decompressed data too large"):
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
