from __future__ import annotations

import pytest
from haste.report.page import Panel


@pytest.fixture
def without_figures(monkeypatch):
    """matplotlib gets numbers alone, which test_page.py has; without it a page takes a millisecond."""
    monkeypatch.setattr(Panel, "png", lambda panel, theme: b"")
