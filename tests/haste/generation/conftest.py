from __future__ import annotations

import pytest
from haste.training.config import STUDENTS
from latent_student import NAME, SHAPE


@pytest.fixture(autouse=True)
def _small_published_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published name stands for a model of a few thousand weights."""
    monkeypatch.setitem(STUDENTS, NAME, SHAPE)
