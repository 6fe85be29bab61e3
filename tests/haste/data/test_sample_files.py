from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from drawn_images import read_images, read_npz
from haste.data.images import image_path, to_uint8, write_image, write_npz
from haste.errors import UserError


def random_images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


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
    one = random_images(1, size=64)[0]
    count = 400
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", (one for _ in range(count)), np.zeros(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    images = read_npz(tmp_path / "samples.npz")[0]
    assert images.shape == (count, 64, 64, 3) and (images == one).all()
    assert peak < 0.2 * images.nbytes


def test_an_npz_of_images_that_do_not_fit_together_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"different sizes, \(8, 8, 3\) and \(9, 9, 3\)"):
        write_npz(tmp_path / "s.npz", [*random_images(1), *random_images(1, size=9)], np.zeros(2))
    with pytest.raises(ValueError, match="shorter"):
        write_npz(tmp_path / "s.npz", random_images(2), np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_an_npz_of_somebody_else_has_no_labels(tmp_path):
    np.savez(tmp_path / "foreign.npz", random_images(3))
    assert read_npz(tmp_path / "foreign.npz")[1] is None
