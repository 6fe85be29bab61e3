from __future__ import annotations

import pytest
from mean_colours import MeanColours


@pytest.fixture
def network() -> MeanColours:
    return MeanColours()
