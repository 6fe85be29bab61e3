from __future__ import annotations

import pytest
from haste.models import get_family
from latent_student import NAME, SHAPE


@pytest.fixture(autouse=True)
def _small_published_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published name stands for a model of a few thousand weights."""
    monkeypatch.setitem(get_family("sit").sizes, NAME, SHAPE)
