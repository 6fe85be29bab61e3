"""Runs with LightningDiT's parts: begun with its checkpoints, sampled, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from haste.cli.main import main
from haste.errors import UserError
from haste.models import DiT, SiT, get_family
from haste.models.dit_diffusers import to_diffusers
from haste.training import trainer as training
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.config import TrainConfig, resolve
from haste.training.trainer import train

PARTS = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
SHAPE = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 1}


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch) -> None:
    monkeypatch.setitem(get_family("sit").sizes, "LightningDiT-Tiny/1", {**SHAPE, **PARTS})


@pytest.fixture
def public_file(tmp_path):
    """Of a model of 8 x 8 pixels, as LightningDiT's trainer saves it."""
    torch.manual_seed(1)
    model = SiT(**SHAPE, **PARTS, input_size=8, in_channels=1, num_classes=10)
    file = tmp_path / "lightningdit-tiny.pt"
    torch.save({"model": model.state_dict(), "ema": model.state_dict()}, file)
    return file


def test_a_run_begins_with_its_weights_at_patch_1_and_is_sampled(make_config, public_file, tmp_path):
    """The teacher then has 8 x 8 tokens too: 16 x 16 pixels in patches of 2."""
    result = train(make_config(model="LightningDiT-Tiny/1", init_from=str(public_file), max_train_steps=1))
    read = read_checkpoint(public_file)
    began = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 1))
    assert began["model_config"]["positions"] == "rope" and began["model"]["pos_embed"].shape == (1, 64, 16)
    name = "blocks.1.mlp.w12.weight"
    assert torch.equal(began["model"]["feat_rope.freqs_cos"], read["model"]["feat_rope.freqs_cos"])
    torch.testing.assert_close(began["model"][name], read["model"][name], rtol=0, atol=0.01)  # a step away
    words = ["sample", "--ckpt", str(result.folder), "--num-fid-samples", "2", "--num-steps", "8", "--fast"]
    main([*words, "--sample-dir", str(tmp_path / "samples")])
    assert list((tmp_path / "samples").rglob("*.npz"))


@pytest.mark.parametrize("name", [*PARTS, "qk_norm"])
def test_another_part_than_that_of_init_from_is_refused_by_its_flag(make_config, public_file, name):
    other = {"positions": "sincos", "norm": "layernorm", "mlp": "gelu", "qk_norm": True}[name]
    config = make_config(model="LightningDiT-Tiny/1", init_from=str(public_file), **{name: other})
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be .*, as of the model of --init-from, got"):
        train(config)


@pytest.mark.parametrize("model", ["xAR-B", "MM-DiT-COCO"])
@pytest.mark.parametrize(("name", "value"), PARTS.items())
def test_families_without_such_blocks_refuse_the_flags(make_config, monkeypatch, model, name, value):
    monkeypatch.setattr(training, "load_dataset", None)
    with pytest.raises(UserError, match=f"--{name} must be left out for .*, which has none, got {value}"):
        train(make_config(model=model, **{name: value}))


def test_heads_that_rope_cannot_turn_are_refused_by_the_flag(make_config):
    with pytest.raises(UserError, match=r"--positions must be sincos for heads of 6 channels, .*, got rope"):
        train(make_config(positions="rope", hidden_size=12, num_heads=2))


def test_a_part_is_recorded_only_where_it_is_not_the_model_s():
    """So runs from before there were parts resume, and refuse another one by its flag."""
    assert [resolve(TrainConfig(model="SiT-B/1", norm=norm)).norm for norm in ("layernorm", "rmsnorm")] == [
        None, "rmsnorm",
    ]  # fmt: skip
    assert resolve(TrainConfig(model="LightningDiT-XL/1", norm="rmsnorm")).norm is None
    assert resolve(TrainConfig(model="LightningDiT-XL/1", norm="layernorm")).norm == "layernorm"


def test_a_run_of_other_parts_is_refused(make_config):
    config = make_config(max_train_steps=1, attn_coeff=0.0, proj_coeff=0.0)
    train(config)
    with pytest.raises(UserError, match="--mlp gelu, not swiglu"):
        train(dataclasses.replace(config, max_train_steps=2, mlp="swiglu"))


def test_diffusers_has_no_such_dit():
    config = {**SHAPE, **PARTS, "input_size": 8, "in_channels": 4, "num_classes": 10, "positions": "sincos"}
    with pytest.raises(UserError, match="must be trained with --norm layernorm, as diffusers' DiT, got rmsnorm"):
        to_diffusers(DiT(**config).state_dict(), config)
