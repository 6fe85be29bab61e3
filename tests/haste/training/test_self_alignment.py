"""Runs that are aligned with their own EMA (SRA): losses before and after τ, resumed, refused."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, replace

import haste
import pytest
import torch
from haste.alignment.self_alignment import SelfAligner
from haste.errors import UserError
from haste.models import build_model, get_family
from haste.training.checkpoint import read_checkpoint
from haste.training.config import TrainConfig, resolve
from haste.training.settings import differing_settings
from haste.training.trainer import train
from training_runs import assert_a_killed_run_is_the_unbroken_one, read_log

SRA = {"sra_coeff": 0.2, "enc_type": None, "encoder_depth": 1, "block_out_t": 2}
HEAD = ["projectors.0.0.weight", "projectors.0.0.bias", "projectors.0.2.weight", "projectors.0.2.bias"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("dit").sizes, "DiT-Tiny/2", size)
    monkeypatch.setitem(get_family("mmdit").sizes, "MM-DiT-Tiny", size)


def test_the_loss_is_logged_weighed_and_ends_with_its_head(make_config, monkeypatch):
    calls = []
    original = SelfAligner.ema_outputs

    def ema_outputs(self, ema, x, noise, t, condition):
        calls.append((x, noise, t, condition, {name: weight.clone() for name, weight in ema.state_dict().items()}))
        return original(self, ema, x, noise, t, condition)

    monkeypatch.setattr(SelfAligner, "ema_outputs", ema_outputs)
    result = train(make_config(**SRA, cfg_prob=0.5, termination="cosine-ramp", max_train_steps=8))
    log = read_log(result.folder)
    assert (
        [line["sra_loss"] is None for line in log]
        == [line["aligned"] is False for line in log]
        == [False] * 6 + [True] * 2
    )
    for line in log:
        weight = 0.2 * (1 + torch.tensor(torch.pi * (line["step"] - 1) / 6).cos().item()) / 2
        expected = line["loss"] + (weight * line["sra_loss"] if line["aligned"] else 0)
        assert (
            line["total_loss"] == pytest.approx(expected, rel=1e-5) and line["proj_loss"] is line["attn_loss"] is None
        )

    # The times, noise and labels of a run without; the weights are the EMA's of that step.
    assert len(calls) == 6 and any((condition == 10).any() for _, _, _, condition, _ in calls)
    before, last = (read_checkpoint(result.folder / "checkpoints" / f"000000{step}.pt") for step in (4, 8))
    for name, weight in before["ema"].items():
        assert torch.equal(calls[4][4][name], weight)
    for part in ("model", "ema"):
        heads = [[name for name in saved[part] if name.startswith("projectors.")] for saved in (before, last)]
        assert heads == [HEAD, HEAD] and last[part][HEAD[0]].shape == (32, 16)
    vanilla = read_log(train(make_config(exp_name="vanilla", enc_type=None, cfg_prob=0.5, max_train_steps=1)).folder)
    assert vanilla[0]["loss"] == log[0]["loss"] and vanilla[0]["sra_loss"] is None


@pytest.mark.parametrize("stop", [3, 10])
@pytest.mark.parametrize(
    "family", [{}, {"model": "DiT-Tiny/2"}, {"model": "MM-DiT-Tiny", "data_dir": "digits-captions"}]
)
def test_a_killed_run_is_the_unbroken_one(make_config, monkeypatch, family, stop):
    def make(**changes):
        return make_config(**SRA, **family, **changes)

    assert_a_killed_run_is_the_unbroken_one(make, monkeypatch, stop)


def test_it_goes_with_dispersive_loss_and_micro_batches_share_the_steps_numbers(make_config):
    settings = {**SRA, "max_train_steps": 1, "ema_decay": 0.5}
    runs = [
        read_log(train(make_config(**settings, exp_name=f"of{count}", batch_size=8 // count,
                                   gradient_accumulation_steps=count)).folder)[0]
        for count in (1, 2)
    ]  # fmt: skip
    assert runs[0]["sra_loss"] == pytest.approx(runs[1]["sra_loss"], rel=1e-5)
    both = read_log(train(make_config(**settings, exp_name="both", batch_size=8, disp_coeff=0.5)).folder)[0]
    assert both["sra_loss"] == runs[0]["sra_loss"]
    total = both["loss"] + 0.2 * both["sra_loss"] + 0.5 * both["disp_loss"]
    assert both["total_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("model", "blocks"), [("SiT-XL/2", (8, 20)), ("SiT-B/2", (4, 8)), ("DiT-XL/2", (8, 20))])
def test_the_blocks_are_the_published_ones(model, blocks):
    config = resolve(TrainConfig(model=model, exp_name="run", enc_type=None, sra_coeff=0.2))
    assert (config.encoder_depth, config.block_out_t) == blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_type": "dinov2-vit-b"}, "--enc-type must be None with --sra-coeff 0.2"),
        ({"enc_type": "dinov2-vit-b", "cls_coeff": 0.03}, "--enc-type must be None with --sra-coeff 0.2"),
        ({"model": "xAR-Tiny/2"}, "--sra-coeff must be 0 for xAR"),
        ({"projection_layer_type": "conv"}, "--projection-layer-type must be left out with --sra-coeff"),
        ({"block_out_t": 4}, "--block-out-t must be 1, the --encoder-depth, to 3"),
        ({"encoder_depth": 3}, "--block-out-t must be 3, the --encoder-depth, to 3"),
        ({"encoder_depth": 4}, "--encoder-depth must be 1 to 3"),
        ({"termination": "plateau"}, "--termination must be fixed or cosine-ramp with --sra-coeff"),
        ({"termination": "gradient-cosine"}, "--termination must be fixed or cosine-ramp with --sra-coeff"),
    ],
)
def test_what_does_not_go_with_it_is_refused(make_config, change, message):
    with pytest.raises(UserError, match=message):
        train(make_config(**{**SRA, **change}))


def test_the_public_trainers_checkpoints_are_read(tmp_path):
    model = build_model({**get_family("sit").sizes["SiT-Tiny/2"], "input_size": 8, "in_channels": 4, "num_classes": 10,
                         "encoder_depth": 2, "projection_layer_type": "sra"}, (16,))  # fmt: skip
    public = {re.sub(r"projectors.0.([02])", lambda found: f"ap_head.linear{int(found[1]) // 2 + 1}", name): weight
              for name, weight in model.state_dict().items()}  # fmt: skip
    assert "ap_head.linear1.bias" in public and "ap_head.linear2.weight" in public
    args = argparse.Namespace(model="SiT-Tiny/2", num_classes=10, resolution=64, path_type="linear", prediction="v",
                              weighting="uniform", block_out_s=8, block_out_t=20, t_max=0.2)  # fmt: skip
    torch.save({"model": public, "ema": public, "opt": {}, "args": args, "epoch": 1, "steps": 7}, tmp_path / "7.pt")
    found = read_checkpoint(tmp_path / "7.pt")
    assert list(found["ema"]) == list(model.state_dict()) and found["steps"] == 7
    loaded = haste.load_checkpoint(tmp_path / "7.pt", device="cpu").model
    x, t, y = torch.rand(1, 4, 8, 8), torch.rand(1), torch.tensor([3])
    assert torch.equal(loaded(x, t, y).prediction, model.eval()(x, t, y).prediction)


def test_a_resumed_run_keeps_it():
    off = TrainConfig(exp_name="run", enc_type=None)
    assert differing_settings(asdict(off), replace(off, block_out_t=3)) == []
    on = replace(off, sra_coeff=0.2)
    assert differing_settings(asdict(off), on)[0] == "--sra-coeff 0.0, not 0.2"
    older = {name: value for name, value in asdict(off).items() if name != "sra_coeff"}
    assert "--sra-coeff 0.0, not 0.2" in differing_settings(older, on)
    assert differing_settings(asdict(on), replace(on, block_out_t=10)) == ["--block-out-t 20, not 10"]
    assert differing_settings(asdict(on), replace(on, encoder_depth=7)) == ["--encoder-depth 8, not 7"]
    assert differing_settings(asdict(on), replace(on, early_stop_point=9)) == ["--early-stop-point -1, not 9"]
    assert differing_settings(asdict(on), replace(on, projector_dim=9, probe_every=9, layer_map="1:1")) == []
