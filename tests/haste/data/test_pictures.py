import io

import numpy as np
import pytest
from haste.data.bad_files import BadFile
from haste.data.pictures import center_crop, decode_picture, is_picture
from picture_files import photographs, pixels_of
from PIL import Image


def test_a_picture_of_the_right_size_is_left_alone():
    (picture,) = photographs(1, (16, 16))
    assert (center_crop(picture, 16) == pixels_of(picture)).all()


def test_twice_the_size_is_the_mean_of_each_two_by_two_block():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    means = pixels_of(picture).reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.abs(center_crop(picture, 16) - means).max() <= 1  # Pillow rounds rows, then columns


@pytest.mark.parametrize("size, window", [((21, 16), np.s_[:, :, 2:18]), ((16, 19), np.s_[:, 1:17, :])])
def test_the_longer_side_is_cropped_in_the_middle(size, window):
    (picture,) = photographs(1, size)
    assert (center_crop(picture, 16) == pixels_of(picture)[window]).all()


def test_between_the_sizes_the_shorter_side_is_resized_by_bicubic_interpolation():
    (picture,) = photographs(1, (60, 40))
    halved = picture.resize((30, 20), Image.Resampling.BOX).resize((24, 16), Image.Resampling.BICUBIC)
    assert (center_crop(picture, 16) == pixels_of(halved)[:, :, 4:20]).all()


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_eight_bit_kind_of_picture_becomes_rgb(mode):
    (picture,) = photographs(1)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_picture(encoded(picture.convert(mode), kind), "x").mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_that_is_cut_short_anywhere_is_refused(kind):
    (picture,) = photographs(1)
    data = encoded(picture, kind)
    assert decode_picture(data, "x").size == picture.size
    for length in range(0, len(data) // 2, 7):
        with pytest.raises(BadFile, match="x is (no picture|no whole picture|empty)"):
            decode_picture(data[:length], "x")


def test_what_is_no_picture_and_what_has_sixteen_bits_is_refused():
    with pytest.raises(BadFile, match="x is no picture"):
        decode_picture(b"not found", "x")
    with pytest.raises(BadFile, match="x has pixels of type I;16; they must have 8 bits a channel"):
        decode_picture(encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "PNG"), "x")


def test_endings_of_pictures():
    assert is_picture("a/b.png") and is_picture("B.JPEG") and is_picture("n01_7.JPG")
    assert not is_picture("labels.json") and not is_picture("README") and not is_picture("png")
