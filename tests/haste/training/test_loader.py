"""What a run loaders on: the same images and chance wherever it begins; and runs on latents made on the way."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from haste.data import load_dataset
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.config import TrainConfig
from haste.training.loader import Loader
from haste.training.trainer import train
from image_files import save_vae, write_classes
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Twelve photographs in three classes, and a VAE that makes 4 x 4 latents of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("images")
    return write_classes(folder / "classes"), save_vae(folder / "vae")


@pytest.fixture
def make_loader(image_folder):
    classes, vae = image_folder

    def make(start=0, images=True, **changes):
        config = TrainConfig(**{"batch_size": 4, "num_workers": 0, "gradient_accumulation_steps": 2, **changes})
        data = load_dataset(str(classes), 16, vae=str(vae))
        return Loader(data, config, Accelerator(cpu=True), start, images)

    return make


def test_a_loader_that_begins_later_gives_the_same(make_loader):
    whole, later = make_loader(), make_loader(start=1)
    steps = list(itertools.product((0, 1, 2), (0, 1)))
    batches = {place: whole.next(*place) for place in steps}
    torch.rand(100)  # the run's own numbers are of no account
    for place in steps[2:]:
        batch = later.next(*place)
        for a, b in zip(batch, batches[place], strict=True):
            assert torch.equal(a, b)
    first, again = batches[0, 0], make_loader(seed=1).next(0, 0)
    assert not torch.equal(first.inputs, again.inputs)


def test_a_probe_sees_the_same_images_every_time_and_leaves_the_run_alone(make_loader):
    loader, other = make_loader(probe_images=5), make_loader()
    first = [batch.inputs for batch in loader.probe()]
    assert [len(inputs) for inputs in first] == [2, 2]
    assert torch.equal(loader.next(0, 0).inputs, other.next(0, 0).inputs)
    again = [batch.inputs for batch in loader.probe()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(loader.next(0, 1).inputs, other.next(0, 1).inputs)


@pytest.fixture(scope="module")
def colour_teacher(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4, num_channels=3
    )
    folder = tmp_path_factory.mktemp("teacher")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_on_latents_made_on_the_way_resumes_bit_for_bit(make_config, image_folder, colour_teacher, stop):
    classes, vae = image_folder

    def run(name, steps):
        config = make_config(
            exp_name=name, max_train_steps=steps, data_dir=str(classes), vae=str(vae), resolution=16,
            enc_type=str(colour_teacher), num_workers=1,
        )  # fmt: skip
        return read_checkpoint(checkpoint_path(train(config).folder / "checkpoints", steps))

    unbroken = run("unbroken", 12)
    run("broken", stop)
    resumed = run("broken", 12)
    assert unbroken["model_config"]["in_channels"] == 4 and unbroken["model_config"]["num_classes"] == 3
    assert unbroken["latents"]["scale"] == (0.5,) * 4
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], value) for name, value in unbroken[part].items())
