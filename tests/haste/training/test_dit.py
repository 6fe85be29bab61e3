"""DiT is trained by its own loss with all that the trainer has: aligned, resumed bit for bit, by several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from haste.models import get_family
from haste.training.config import TrainConfig
from training_runs import assert_a_killed_run_is_the_unbroken_one


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch) -> None:
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("dit").sizes, "DiT-Tiny/2", size)


@pytest.fixture
def make_dit(make_config) -> Callable[..., TrainConfig]:
    """A HASTE run of 12 steps on the digits, whose alignment ends at step 6."""
    return partial(make_config, model="DiT-Tiny/2", sampling_steps=0)


@pytest.mark.parametrize("stop", [5, 10])  # aligned, and after that; a step or two after a checkpoint
def test_a_killed_run_resumes_bit_for_bit(make_dit, monkeypatch, stop):
    assert_a_killed_run_is_the_unbroken_one(make_dit, monkeypatch, stop)
