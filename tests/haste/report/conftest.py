from __future__ import annotations

import pytest


@pytest.fixture
def without_figures(monkeypatch):
    """matplotlib gets numbers alone, which test_plots.py has; without it a page takes a millisecond."""
    monkeypatch.setattr("haste.report.runs.panels_html", lambda panels, last_step: "")
