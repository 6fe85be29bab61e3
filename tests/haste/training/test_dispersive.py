"""Runs with Dispersive Loss: with a teacher and without, killed and resumed."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from haste.errors import UserError
from haste.training.config import TrainConfig, resolve
from haste.training.settings import differing_settings
from haste.training.trainer import train
from training_runs import assert_a_killed_run_is_the_unbroken_one, read_log

DISPERSIVE = {"disp_coeff": 0.5, "disp_depth": 2}


@pytest.mark.parametrize("family", [{"enc_type": None}, {"model": "xAR-Tiny/2", "dropout": 0.1}])
def test_a_killed_run_is_the_unbroken_one(make_config, monkeypatch, family):
    def make(**changes):
        return make_config(**DISPERSIVE, **family, **changes)

    assert_a_killed_run_is_the_unbroken_one(make, monkeypatch, 5)


def test_it_is_logged_weighed_and_falls_and_stays_when_alignment_ends(make_config):
    settings = {"batch_size": 16, "learning_rate": 1e-2}
    log = read_log(train(make_config(**DISPERSIVE, **settings, max_train_steps=30)).folder)
    for line in log:
        terms = line["loss"] + 0.5 * line["disp_loss"]
        if line["aligned"]:
            terms += 0.5 * line["proj_loss"] + 0.5 * line["attn_loss"]
        assert line["total_loss"] == pytest.approx(terms, rel=1e-5)
    assert log[0]["aligned"] and not log[-1]["aligned"]
    losses = [line["disp_loss"] for line in log]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    without = read_log(train(make_config(**settings, exp_name="without", max_train_steps=1)).folder)
    assert without[0]["disp_loss"] is None and without[0]["loss"] == log[0]["loss"]


def test_two_micro_batches_are_two_batches(make_config):
    """The loss is of the local batch, as in the public code, so it differs where the other losses do not."""
    whole, halves = (
        read_log(train(make_config(**DISPERSIVE, max_train_steps=1, exp_name=f"of{count}", batch_size=8 // count,
                                   gradient_accumulation_steps=count)).folder)[0]
        for count in (1, 2)
    )  # fmt: skip
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert abs(halves["disp_loss"] - whole["disp_loss"]) > 1e-3


def test_the_block_is_the_one_after_a_quarter(make_config):
    assert resolve(TrainConfig(model="SiT-B/2", exp_name="run")).disp_depth == 3
    assert resolve(make_config()).disp_depth == 1
    assert (make_config().disp_block, make_config(**DISPERSIVE).disp_block) == (0, 2)


def test_bad_values_are_refused(make_config):
    with pytest.raises(UserError, match="--disp-depth must be 1 to 3, .* got 4"):
        make_config(disp_coeff=0.5, disp_depth=4).check_model()
    with pytest.raises(UserError, match="--disp-tau must be"):
        make_config(disp_tau=0.0).check()
    with pytest.raises(UserError, match="--batch-size must be at least 2"):
        train(make_config(**DISPERSIVE, batch_size=1))


def test_what_has_no_effect_makes_no_other_run():
    off = TrainConfig(exp_name="run")
    assert differing_settings(asdict(off), replace(off, disp_depth=5, disp_tau=0.5)) == []
    on = replace(off, **DISPERSIVE)
    assert differing_settings(asdict(off), on) == ["--disp-coeff 0.0, not 0.5"]
    assert differing_settings(asdict(on), replace(on, disp_tau=0.5)) == ["--disp-tau 1.0, not 0.5"]
