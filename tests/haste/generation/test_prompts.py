"""--prompts: what a text, a file and a folder become."""

from __future__ import annotations

import os

import pytest
from haste.errors import UserError
from haste.generation import prompts
from haste.generation.prompts import describe_prompts, list_prompts, name_prompts, prompt_folder, prompt_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def test_a_text_a_file_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes("\ufeffa red cat\r\n\r\n  ein  Fluß \n".encode())
    (tmp_path / "val").mkdir()
    assert list_prompts("") == "" and prompt_texts("") == [] and prompt_folder("") is None
    assert prompt_texts(list_prompts("a red cat")) == ["a red cat"]
    assert prompt_texts(list_prompts("list.txt")) == ["a red cat", "ein Fluß"]
    assert prompt_texts(list_prompts("one\ntwo\n")) == ["one", "two"]
    assert list_prompts("val") == "val" and str(prompt_folder("val")) == "val" and prompt_texts("val") == []
    for given_ in ("", "a red cat", "list.txt", "val", "one\ntwo"):
        assert list_prompts(list_prompts(given_)) == list_prompts(given_)


def test_a_prompt_of_a_file_is_not_taken_for_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "list.txt").write_text("cats\n")
    resolved = list_prompts(list_prompts("list.txt"))
    assert prompt_folder(resolved) is None and prompt_texts(resolved) == ["cats"]
    assert prompt_folder(list_prompts("cats")) is not None


def test_prompts_have_a_name_and_a_description(tmp_path):
    one, two = list_prompts("a red cat"), list_prompts("a red cat\na dog")
    assert describe_prompts(one) == "a red cat"
    assert describe_prompts(two).startswith("2 prompts, ") and describe_prompts(two) != describe_prompts("a\nb\n")
    assert name_prompts(two).startswith("prompts2_") and name_prompts(one) != name_prompts("a dog\n")
    (tmp_path / "val 2014").mkdir()
    assert name_prompts(str(tmp_path / "val 2014")) == "prompts-val_2014"
    assert describe_prompts(str(tmp_path / "val 2014")) == "val 2014"
    assert len(describe_prompts("x" * 100 + "\n")) < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which has no prompt"),
        (b" \n\r\n\t\n", "which has no prompt"),
        ("ein Fluß".encode("latin-1"), "utf-8"),
        (b"\xff\xfea\x00", "utf-8"),
    ],
)
def test_files_without_a_prompt_or_not_utf8_are_refused(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^--prompts must be .*list.txt.*{message}"):
        list_prompts(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/nowhere/at/all"])
def test_a_file_that_does_not_exist_is_no_prompt(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^--prompts must be .* does not exist"):
        list_prompts(name)


def test_a_pipe_and_a_file_of_absurd_size_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--prompts must be .*a pipe"):
        list_prompts(str(tmp_path / "pipe"))
    monkeypatch.setattr(prompts, "LARGEST_FILE", 10)
    (tmp_path / "list.txt").write_text("a red cat on a chair")
    with pytest.raises(UserError, match="--prompts must be .* at most 10 "):
        list_prompts(str(tmp_path / "list.txt"))


def texts_or_sentence(policy: str) -> None:
    try:
        resolved = list_prompts(policy)
    except UserError as error:
        assert str(error).startswith("--prompts ") and "\n" not in str(error)
    else:
        assert list_prompts(resolved) == resolved
        assert all(text.strip() and text.encode() for text in prompt_texts(resolved))


@given(st.one_of(st.text(), st.text("a/~.\n\0\ud800 ", max_size=20)))
def test_any_text(policy):
    texts_or_sentence(policy)


@given(st.one_of(st.binary(), st.text().map(str.encode)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_any_bytes(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    texts_or_sentence(str(tmp_path / "list.txt"))
