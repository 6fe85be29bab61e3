"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "caching: test every transformer class and pipeline of the zoo, not a few of each kind"
    parser.addoption("--zoo", action="store_true", help=text)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what the imports have made out of every later garbage collection, each of which would take 0.3 s."""
    gc.collect()
    gc.freeze()
