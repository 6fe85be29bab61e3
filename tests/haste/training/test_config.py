from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from haste.errors import UserError
from haste.training.config import TrainConfig


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exp_name": ""}, "--exp-name must be the name of the run"),
        ({"batch_size": 10**12}, "--batch-size must be an integer from 1 to 1,048,576, got 1000000000000"),
        ({"learning_rate": 0.0}, "--learning-rate must be a number above 0 and up to 1,000, got 0.0"),
        ({"cfg_prob": 1.0}, "--cfg-prob must be a number from 0 to below 1, got 1.0"),
        ({"report_to": "mlflow"}, "--report-to must be tensorboard, wandb, both .* got mlflow"),
    ],
)
def test_values_that_no_run_can_have_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(TrainConfig(exp_name="a"), **change).check()


def test_teachers_are_those_that_have_something_to_teach():
    assert TrainConfig(enc_type="a, b").teachers == ["a", "b"]
    assert TrainConfig(enc_type="a", proj_coeff=0.0, attn_coeff=0.5).teachers == ["a"]
    assert TrainConfig(enc_type="a", proj_coeff=0.0).teachers == []
    assert TrainConfig(enc_type="None").teachers == []  # as REPA's commands have it


def test_the_namespace_of_a_checkpoint_gives_the_settings_back():
    config = TrainConfig(exp_name="a", seed=3, teacher_resolution=448)
    namespace = config.to_namespace()
    assert type(namespace) is argparse.Namespace
    assert TrainConfig.from_dict(vars(namespace)) == config


def test_another_trainers_own_flags_are_left_out():
    assert TrainConfig.from_dict({"seed": 5, "vae_type": "ema"}) == TrainConfig(seed=5)


@pytest.mark.parametrize(("enc_type", "aligned"), [("dinov2-vit-b", True), ("None", False)])
def test_without_a_teacher_no_coefficient_aligns_anything(enc_type, aligned):
    config = TrainConfig(enc_type=enc_type, attn_coeff=0.5, proj_coeff=0.5)
    assert (config.aligns_attention, config.aligns_features) == (aligned, aligned)


def test_nobody_saying_more_it_is_repa():
    config = TrainConfig()
    assert (config.attn_coeff, config.proj_coeff, config.early_stop_point) == (0.0, 0.5, -1)


def test_legacy_drops_labels_twice():
    assert TrainConfig(cfg_prob=0.1).label_dropout == 0.1
    assert TrainConfig(cfg_prob=0.1, legacy=True).label_dropout == pytest.approx(0.19)
    assert TrainConfig(cfg_prob=0.0, legacy=True).label_dropout == 0.0


@pytest.mark.parametrize("flag", ["exp_name", "logging_dir"])
@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", ".", "..", "a\nb", "a\0b", "\udc80", " a", "a ", "\x1b[31m", "a" * 201]
)
def test_what_is_no_plain_name_of_a_folder_is_refused(flag, name):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} must be a plain name of a folder") as caught:
        replace(TrainConfig(exp_name="a"), **{flag: name}).check()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["linear-dinov2-b-enc8", "$\\frac{$", "été 2", ".a", "a" * 200])
def test_any_plain_name_of_a_folder_will_do(name):
    TrainConfig(exp_name=name).check()
