import shutil
from pathlib import Path

import pytest
import torch
from haste.data import BatchOrder, batches, load_dataset
from haste.errors import UserError
from haste.vae import VAE, LatentFormat
from image_files import cut_short


def test_digits_by_name():
    data = load_dataset("digits", 8)
    assert (len(data), data.channels, data.resolution, data.input_size, data.num_classes) == (1797, 1, 8, 8, 10)
    assert data.latents is None and data.without_images() is data


def test_images_of_a_folder_as_pixels(class_folder):
    data = load_dataset(str(class_folder), 8)
    assert (len(data), data.channels, data.resolution, data.input_size, data.num_classes) == (12, 3, 8, 8, 3)
    batch = next(batches(data, BatchOrder(12, 12, seed=0)))
    assert batch.inputs.shape == (12, 3, 8, 8) and batch.inputs.dtype == torch.float32
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1
    assert batch.labels.dtype == torch.int64


def test_images_of_a_folder_as_latents_made_on_the_fly(class_folder, vae_folder):
    data = load_dataset(str(class_folder), 8, vae=str(vae_folder))
    assert (data.channels, data.input_size, data.latents) == (4, 2, LatentFormat.of(str(vae_folder)))
    order = BatchOrder(12, 12, seed=0)
    batch = next(batches(data, order, num_workers=2, generator=torch.Generator().manual_seed(0)))
    assert batch.images.shape == (12, 3, 8, 8)
    moments = VAE(data.latents).encode(batch.images)
    expected = data.latents.draw(moments, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.inputs, expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing", 8), "--data-dir must be .* or one of: digits, got 'nothing'"),
        (("", 8), "--data-dir must be .* or one of: digits, got ''"),
        (("digits", 16), "--resolution must be 8, like the digits images, got 16"),
    ],
)
def test_data_that_does_not_exist_or_fit_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_dataset(*arguments)


def test_settings_that_do_not_fit_a_folder_are_refused(class_folder, vae_folder):
    folder = str(class_folder)
    with pytest.raises(UserError, match="--vae-stats must come with --vae"):
        load_dataset(folder, 8, vae_stats="x.pt")
    with pytest.raises(UserError, match="--resolution is 10; it must be a multiple of 4"):
        load_dataset(folder, 10, vae=str(vae_folder))
    with pytest.raises(UserError, match="--num-classes must be at least 3, as in the data, got 2"):
        load_dataset(folder, 8, num_classes=2)
    cut_short(class_folder / "ant" / "00.png")
    with pytest.raises(UserError, match="ant/00.png is no whole image"):
        load_dataset(folder, 8)
    assert load_dataset(folder, 8, num_classes=1000, on_bad_file="skip").num_classes == 1000


@pytest.mark.parametrize("packed", [False, True])
def test_latents_under_another_name_are_named_and_refused(repa_folder, packed):
    (repa_folder / "vae-sd").rename(repa_folder / "vae-in")
    name = "vae-in"
    if packed:
        name = Path(shutil.make_archive(str(repa_folder / "vae-in"), "zip", repa_folder / "vae-in")).name
        shutil.rmtree(repa_folder / "vae-in")
    with pytest.raises(UserError, match=f"where {name} holds .npy files that would not be read"):
        load_dataset(str(repa_folder), 16)
    assert len(load_dataset(str(repa_folder / "images"), 16)) == 6
