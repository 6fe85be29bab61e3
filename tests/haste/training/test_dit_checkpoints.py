"""A DiT run begins with DiT's public files, and with no SiT's."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from haste.data.load import load_dataset
from haste.errors import UserError
from haste.models import get_family
from haste.training.checkpoint import read_newest_checkpoint
from haste.training.run_dir import RunDir
from haste.training.trainer import Trainer, make_accelerator, train
from public_dit import ARGS, NAME, SHAPE, random_dit, write
from small_models import random_sit

DIGITS = {"input_size": 8, "in_channels": 1}


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch) -> None:
    monkeypatch.setitem(get_family("dit").sizes, NAME, SHAPE)


@pytest.fixture
def make_dit(make_config):
    return lambda **changes: make_config(model=NAME, sampling_steps=0, **changes)


@pytest.fixture
def public(tmp_path) -> Path:
    """The folder of a run of the public trainer on the digits."""
    model, ema = (random_dit(seed, **DIGITS).state_dict() for seed in (0, 1))
    content = {"model": model, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(**ARGS)}
    return write(tmp_path / "results" / "000-DiT-XL-2" / "checkpoints" / "0050000.pt", content).parents[1]


def make_trainer(config) -> Trainer:
    return Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config))


def test_a_run_begins_with_the_weights_of_a_public_run(make_dit, public):
    state = make_trainer(make_dit(init_from=str(public))).state.state_dict()
    for part, seed in (("model", 0), ("ema", 1)):
        for name, value in random_dit(seed, **DIGITS).state_dict().items():
            assert torch.equal(state[part][name], value), name
    assert state["opt"]["state"] == {}


def test_a_public_run_is_begun_anew_as_its_files_have_no_step(public):
    with pytest.raises(UserError, match=r"0050000\.pt lacks steps, so .* cannot be resumed .*; start one with --init"):
        read_newest_checkpoint(public / "checkpoints")


def test_weights_of_sit_and_dit_are_told_apart_by_both(make_config, make_dit, public, tmp_path):
    """A SiT with learn_sigma has DiT's names and shapes."""
    sit = random_sit(**DIGITS).state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        both = torch.stack([sit[name].unflatten(0, (4, 1)), torch.zeros_like(sit[name]).unflatten(0, (4, 1))], dim=1)
        sit[name] = both.flatten(0, 2)
    assert {n: v.shape for n, v in sit.items()} == {n: v.shape for n, v in random_dit(**DIGITS).state_dict().items()}
    path = write(tmp_path / "last.pt", {"ema": sit})
    with pytest.raises(
        UserError, match=rf"--init-from must be a checkpoint of DiT, as --model {NAME}, got one of SiT: "
    ):
        make_trainer(make_dit(init_from=str(path)))
    with pytest.raises(UserError, match=r"--convention must be sit \(.*\), by the content of .*last\.pt, got dit"):
        make_trainer(make_dit(init_from=str(path), convention="dit"))
    with pytest.raises(
        UserError, match="--init-from must be a checkpoint of SiT, as --model SiT-Tiny/2, got one of DiT"
    ):
        make_trainer(make_config(init_from=str(public)))


def test_a_run_of_one_is_not_resumed_as_the_other(make_config, make_dit):
    sit = train(make_config(exp_name="sit", max_train_steps=1, enc_type=None))
    shutil.copytree(sit.folder, RunDir(make_dit()).path)
    with pytest.raises(UserError, match=f"--model SiT-Tiny/2, not {NAME}"):
        train(make_dit())


def test_files_that_do_not_name_their_model_are_resumed_by_their_own_family_alone(make_dit):
    weights, args = random_sit(**DIGITS).state_dict(), argparse.Namespace()
    folder = RunDir(make_dit()).path / "checkpoints"
    write(folder / "0000004.pt", {"model": weights, "ema": weights, "opt": {"state": {}}, "args": args, "steps": 4})
    with pytest.raises(UserError, match=rf"--exp-name must be a run of DiT, as --model {NAME}, got one of SiT: .*run"):
        train(make_dit())
