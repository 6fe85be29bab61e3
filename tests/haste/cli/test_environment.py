from __future__ import annotations

import pytest
from haste.cli.terminal import check_docstrings, check_processes
from haste.errors import UserError

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "4"}, LAUNCHED])
def test_what_launchers_set_is_taken(environment):
    check_processes(environment)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"RANK": "one"}, "RANK must be a whole number of at least 0, got 'one'"),
        ({"RANK": ""}, "RANK must be a whole number of at least 0, got ''"),
        ({"RANK": "-1"}, "RANK must be a whole number of at least 0, got '-1'"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE, which is 2, got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number of at least 0, got 'http'"),
        ({"MASTER_ADDR": None}, "LOCAL_RANK is set, and MASTER_ADDR must be too"),
    ],
)
def test_what_cannot_be_is_named(changes, sentence):
    environment = {name: value for name, value in {**LAUNCHED, **changes}.items() if value is not None}
    with pytest.raises(UserError) as error:
        check_processes(environment)
    assert str(error.value).startswith(sentence)


def test_python_without_docstrings_is_refused():
    check_docstrings(1)
    with pytest.raises(UserError, match="PYTHONOPTIMIZE .* must be 0 or 1, got 2"):
        check_docstrings(2)
