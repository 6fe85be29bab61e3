"""Labels that people type or keep in files: classes, or a sentence."""

from __future__ import annotations

import os

import pytest
from haste.errors import UserError
from haste.generation.config import list_labels
from haste.generation.pipeline import choose_labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def classes_or_sentence(policy: str) -> None:
    """What a command makes of --labels, for a model of ten classes."""
    try:
        chosen = choose_labels(list_labels(policy), 0, range(5), 10)
    except UserError as error:
        assert str(error).startswith("--labels ") and "\n" not in str(error)
    else:
        assert chosen.dtype == "int64" and chosen.shape == (5,) and 0 <= chosen.min() <= chosen.max() < 10


@given(st.one_of(st.text(), st.text("0123456789,-+_ \n~/\0", max_size=30)))
def test_any_text(policy):
    classes_or_sentence(policy)


@pytest.mark.parametrize("policy", ["9" * 5000, "9" * 30, "~nobody-of-this-name/x", "a\0b", "x" * 5000, "٣", "1_0", ""])
def test_text_that_libraries_trip_over(policy):
    with pytest.raises(UserError, match="--labels "):
        choose_labels(list_labels(policy), 0, range(5), 10)


def test_no_text_at_all_is_shown():
    with pytest.raises(UserError, match="got ''$"):
        choose_labels("", 0, range(5), 10)


@given(st.one_of(st.binary(), st.lists(st.integers(-2, 12)).map(lambda n: "\r\n".join(map(str, n)).encode())))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_any_bytes(tmp_path, content):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    classes_or_sentence(str(path))


def test_a_file_as_windows_writes_it(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbf3\r\n1\r\n")
    assert list_labels(str(path)) == "3,1"


def test_a_file_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("haste.generation.config.LARGEST_FILE", 10)
    (tmp_path / "labels.txt").write_text("1\n" * 6)
    with pytest.raises(UserError, match="cannot be read as text: .* at most 10 "):
        list_labels(str(tmp_path / "labels.txt"))


def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    classes_or_sentence(str(tmp_path / "pipe"))
