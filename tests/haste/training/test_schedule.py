"""The learning rate of each step, what cannot be a schedule, and runs that are resumed or extended under one."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from haste.errors import UserError
from haste.models import build_model
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.config import TrainConfig
from haste.training.run_dir import RunDir
from haste.training.schedule import LearningRate
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from training_runs import assert_same_bits, final_state, read_log

XAR = {"warmup_steps": 0.125, "decay_steps": 0.25, "learning_rate": 4e-4, "min_learning_rate": 1e-5}


def rates(length=12, **settings):
    schedule = LearningRate.of_run(TrainConfig(**settings), length)
    return [schedule(step) for step in range(length)]


def test_warmup_raises_the_rate_linearly():
    assert rates(6, warmup_steps=4, learning_rate=0.1) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert rates(6, learning_rate=0.1) == [0.1] * 6


def test_xars_schedule_is_an_eighth_of_warmup_and_a_quarter_of_decay():
    got = rates(800, **XAR)  # an epoch of the paper in each step
    assert got[:100] == pytest.approx([4e-4 * (step + 1) / 100 for step in range(100)], rel=1e-12)
    assert got[100:600] == [4e-4] * 500
    cosine = [1e-5 + 3.9e-4 * 0.5 * (1 + math.cos(math.pi * (epoch - 600) / 200)) for epoch in range(600, 800)]
    assert got[600:] == pytest.approx(cosine, rel=1e-12)
    assert got == rates(800, **{**XAR, "warmup_steps": 100, "decay_steps": 200})


def test_a_linear_decay_ends_above_the_minimum_by_a_step_and_a_cosine_may_be_of_the_whole_run():
    """Warmup, a constant, and a line: WSD; RAE's has no constant at the end."""
    wsd = {"warmup_steps": 2, "decay_steps": 4, "decay_shape": "linear", "learning_rate": 1.0}
    assert rates(8, **wsd) == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(8, **wsd, min_learning_rate=0.2)[4:] == pytest.approx([1, 0.8, 0.6, 0.4])
    whole = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates(8, decay_steps=8, learning_rate=1.0) == pytest.approx(whole)
    assert "linear decay to 0 in the last 4" in str(LearningRate.of_run(TrainConfig(**wsd), 8))


@pytest.mark.parametrize("settings", [{"warmup_steps": 0.5, "decay_steps": 0.5}, {"decay_steps": 7}])
def test_a_schedule_may_fill_the_run(settings):
    got = rates(7, **settings)
    assert max(got) == 1e-4 and got[-1] < got[-2] < got[-3]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"warmup_steps": 13}, "--warmup-steps and --decay-steps must fit into the 12 steps .* got 13 and 0"),
        ({"warmup_steps": 0.75, "decay_steps": 4}, "--warmup-steps and --decay-steps must fit into .* got 9 and 4"),
        ({"decay_steps": 100_000}, "--warmup-steps and --decay-steps must fit"),
        ({"warmup_steps": 1.5}, "--warmup-steps must be a number of steps, or a share .* got 1.5"),
        ({"decay_steps": math.nan}, "--decay-steps must be a number from 0"),
        ({"decay_steps": -1}, "--decay-steps must be a number from 0"),
        ({"decay_steps": 4, "min_learning_rate": 1.0}, "--min-learning-rate must be at most --learning-rate"),
        ({"decay_shape": "linear"}, "--decay-steps must be above 0 with --decay-shape linear, got 0"),
        ({"min_learning_rate": 1e-5}, "--decay-steps must be above 0 with --min-learning-rate"),
    ],
)
def test_what_is_no_schedule_of_a_run_is_refused_before_its_folder_is_made(make_config, settings, flag):
    config = make_config(**settings)
    with pytest.raises(UserError, match=flag):
        train(config)
    assert not RunDir(config).path.exists()


SETTINGS = {"warmup_steps": 0.25, "decay_steps": 0.5, "min_learning_rate": 1e-6}


def test_a_resumed_run_continues_its_schedule_bit_for_bit_and_logs_it(make_config, monkeypatch):
    unbroken = train(make_config(exp_name="unbroken", **SETTINGS))
    expected = rates(12, learning_rate=make_config().learning_rate, **SETTINGS)
    assert [line["learning_rate"] for line in read_log(unbroken.folder)] == expected
    with monkeypatch.context() as patch:
        original = Trainer._train_step
        patch.setattr(Trainer, "_train_step", lambda self: original(self) if self.step < 10 else 1 / 0)
        with pytest.raises(ZeroDivisionError):  # killed in the middle of the decay, 2 steps after a checkpoint
            train(make_config(**SETTINGS))
    result = train(make_config(**SETTINGS))
    assert_same_bits(final_state(result), final_state(unbroken))
    assert [line["learning_rate"] for line in read_log(result.folder)] == expected


@pytest.mark.parametrize(("settings", "warned"), [(SETTINGS, True), ({"warmup_steps": 4, "decay_steps": 0}, False)])
def test_an_extended_run_follows_the_schedule_of_its_new_length(make_config, caplog, settings, warned):
    train(make_config(max_train_steps=4, **settings))
    with caplog.at_level(logging.WARNING):
        folder = train(make_config(max_train_steps=8, **settings)).folder
    assert ("the learning rate follows the run's length, 8 steps; until now that was 4" in caplog.text) == warned
    got = [line["learning_rate"] for line in read_log(folder)]
    rate = make_config().learning_rate
    assert got == rates(4, learning_rate=rate, **settings) + rates(8, learning_rate=rate, **settings)[4:]


# ---- what decays ----


def names_without_decay(model):
    return {name for name, value in model.named_parameters() if value.dim() == 1}


def test_matrices_alone_decay_and_a_checkpoint_fits_an_optimizer_of_such_groups(make_config):
    config = make_config(adam_decay="matrices", adam_weight_decay=0.02, checkpointing_steps=6)
    trainer = Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config))
    kept, decayed = trainer.state.optimizer.param_groups
    assert (kept["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    assert {value.dim() for value in kept["params"]} == {1} and min(value.dim() for value in decayed["params"]) == 2
    folder = trainer.run().folder / "checkpoints"
    for step in (6, 12):  # with projectors, and with freed ones
        saved = read_checkpoint(checkpoint_path(folder, step))
        model = build_model(saved["model_config"], z_dims=(16,))
        model.load_state_dict(saved["model"], strict=True)
        parameters, without = dict(model.named_parameters()), names_without_decay(model)
        groups = [[name for name in parameters if (name in without) == one] for one in (True, False)]
        theirs = torch.optim.AdamW([{"params": [parameters[name] for name in group]} for group in groups])
        theirs.load_state_dict(saved["opt"])
        states = saved["opt"]["state"]
        trained = {name for name in parameters if name != "pos_embed" and not (step == 12 and "projectors" in name)}
        assert {name for number, name in enumerate(parameters) if number in states} == trained
        for number, (name, parameter) in enumerate(parameters.items()):
            if name in trained:
                assert torch.equal(theirs.state[parameter]["exp_avg"], states[number]["exp_avg"]), name
                assert theirs.state[parameter]["step"] == step


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_whose_matrices_alone_decay_resumes_bit_for_bit(make_config, stop):
    settings = {"adam_decay": "matrices", "adam_weight_decay": 0.1, "enc_type": make_config().enc_type}
    unbroken = train(make_config(exp_name="unbroken", **settings))
    train(make_config(max_train_steps=stop, **settings))
    assert_same_bits(final_state(train(make_config(**settings))), final_state(unbroken))
    other = replace(make_config(exp_name="all", **settings), adam_decay="all")
    weights, all_decayed = (final_state(train(config))["model"] for config in (make_config(**settings), other))
    assert not torch.equal(weights["blocks.0.attn.qkv.bias"], all_decayed["blocks.0.attn.qkv.bias"])
