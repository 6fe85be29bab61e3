"""Runs whose teacher has a grid of its own."""

from __future__ import annotations

import pytest
from haste.errors import UserError
from haste.training.trainer import train
from training_runs import assert_a_killed_run_is_the_unbroken_one, read_log

OTHER_GRID = {"teacher_grid": "interpolate-student", "teacher_resolution": 12}  # 6 x 6 tokens; the model has 4 x 4


def test_a_killed_run_with_an_interpolated_student_is_the_unbroken_one(make_config, monkeypatch):
    def make(**changes):
        return make_config(**OTHER_GRID, **changes)

    assert_a_killed_run_is_the_unbroken_one(make, monkeypatch, 3)


def test_it_is_another_run_than_with_an_interpolated_teacher(make_config):
    run = train(make_config(**OTHER_GRID, max_train_steps=2))
    other = train(make_config(**OTHER_GRID | {"teacher_grid": "interpolate"}, exp_name="other", max_train_steps=2))
    first, second = (read_log(result.folder)[0] for result in (run, other))
    assert first["loss"] == second["loss"] and first["attn_loss"] != second["attn_loss"]
    with pytest.raises(UserError, match="--teacher-grid interpolate-student, not interpolate"):
        train(make_config(**OTHER_GRID | {"teacher_grid": "interpolate"}))


def test_block_causal_attention_cannot_be_interpolated_but_features_can(make_config):
    xar = {**OTHER_GRID, "model": "xAR-Tiny/2", "max_train_steps": 2}
    with pytest.raises(UserError, match="--teacher-grid must be match or interpolate for .*, got interpolate-student"):
        train(make_config(**xar))
    assert train(make_config(**xar, attn_coeff=0.0)).step == 2
