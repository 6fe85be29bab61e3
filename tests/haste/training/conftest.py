"""Runs that take a fraction of a second: real digits, a tiny student, a tiny random teacher on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from haste.models import get_family
from haste.training.config import TrainConfig
from small_models import save_teacher


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 2 heads, width 16, 4 x 4 patches of 2 pixels, one channel."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def _tiny_student(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("sit").sizes, "SiT-Tiny/2", size)
    monkeypatch.setitem(get_family("xar").sizes, "xAR-Tiny/2", size)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_config(tmp_path: Path, teacher_folder: Path) -> Callable[..., TrainConfig]:
    """A HASTE run of 12 steps whose alignment ends at step 6; keywords change it."""

    def make(**changes) -> TrainConfig:
        base = TrainConfig.from_preset(
            "digits",
            output_dir=str(tmp_path),
            exp_name="run",
            model="SiT-Tiny/2",
            enc_type=str(teacher_folder),
            layer_map="0:1,1:2",
            encoder_depth=2,
            projector_dim=8,
            early_stop_point=6,
            batch_size=4,
            max_train_steps=12,
            logging_steps=1,
            checkpointing_steps=4,
        )
        return replace(base, **changes)

    return make
