from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import pytest
from haste.errors import UserError
from haste.training.config import TrainConfig, differing_settings


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exp_name": ""}, "--exp-name is empty"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"max_train_steps": -1}, "--max-train-steps is -1; it must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be greater than 0"),
        ({"attn_coeff": -0.5}, "--attn-coeff is -0.5; it must be at least 0"),
        ({"cfg_prob": 1.0}, "--cfg-prob is 1.0; it must be at least 0 and less than 1"),
        ({"ema_decay": float("nan")}, "--ema-decay is nan"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps is 0; it must be at least 1"),
        ({"num_classes": 0}, "--num-classes is 0; it must be at least 1"),
        ({"report_to": "mlflow"}, "--report-to is mlflow; it must be tensorboard, wandb, both"),
        ({"early_stop_point": -2}, "--early-stop-point is -2; it must be a step, or -1 for never"),
    ],
)
def test_values_that_no_run_can_have_are_refused(change, sentence):
    TrainConfig(exp_name="a").check()
    with pytest.raises(UserError, match=sentence):
        replace(TrainConfig(exp_name="a"), **change).check()


def test_teachers_are_those_that_have_something_to_teach():
    assert TrainConfig(enc_type="a, b").teachers == ["a", "b"]
    assert TrainConfig(enc_type="a", attn_coeff=0.0).teachers == ["a"]
    assert TrainConfig(enc_type="a", attn_coeff=0.0, proj_coeff=0.0).teachers == []
    assert TrainConfig(enc_type="None").teachers == []  # as REPA's commands have it


def test_the_namespace_of_a_checkpoint_gives_the_settings_back():
    config = TrainConfig(exp_name="a", seed=3, teacher_resolution=448)
    namespace = config.to_namespace()
    assert type(namespace) is argparse.Namespace
    assert TrainConfig.from_dict(vars(namespace)) == config


def test_another_trainers_own_flags_are_left_out():
    assert TrainConfig.from_dict({"seed": 5, "vae_type": "ema"}) == TrainConfig(seed=5)


def test_only_what_changes_the_computation_makes_another_run():
    new = TrainConfig(exp_name="a")
    old = asdict(new)
    moved = replace(new, max_train_steps=7, logging_steps=3, output_dir="there", data_dir="elsewhere")
    assert differing_settings(old, moved) == []
    assert differing_settings(old, replace(new, seed=1, batch_size=8)) == [
        "--batch-size (256, now 8)",
        "--seed (0, now 1)",
    ]


def test_what_another_trainer_had_no_setting_for_is_not_compared():
    assert differing_settings({"seed": 0, "use_wandb": True}, TrainConfig(attn_coeff=0.7)) == []
