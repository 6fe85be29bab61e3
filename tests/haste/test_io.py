import json
import os
import resource
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from haste import io
from haste.errors import UserError
from haste.io import (
    is_free,
    read_bytes,
    read_json,
    remove_abandoned,
    remove_leftovers,
    require_space,
    save_tensors,
    write_atomically,
    write_json,
    writing,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_kill_leaves_is_known_and_removed_and_other_files_stay(tmp_path):
    assert is_free(tmp_path / "new") and is_free(tmp_path)
    (tmp_path / ".a.json.123.tmp").write_text("half")
    assert is_free(tmp_path)
    (tmp_path / ".notes.tmp").write_text("the user's own")
    assert not is_free(tmp_path)
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".notes.tmp"]
    assert not is_free(tmp_path / ".notes.tmp")


def test_space_is_looked_up_where_the_folder_will_be(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match="an archive takes"):
        require_space(tmp_path / "not" / "yet", 2**62, "an archive")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "NaN", "3", "[" * 100_000, "{}", b"\xff\xfe\x00"])
def test_what_is_no_such_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="a.json must be the settings of a run"):
        read_json(path, "the settings of a run", needs=["seed"])


def test_a_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "missing.json", "No such file")):
        with pytest.raises(UserError, match=f"must be a record, but cannot be read: {reason}"):
            read_json(path, "a record")


def test_only_regular_files_of_the_allowed_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "five").write_bytes(b"12345")
    with pytest.raises(OSError, match="it is a pipe, not a regular file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device, not a regular file"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(OSError, match="it has 5 bytes; at most 4 bytes are read"):
        read_bytes(tmp_path / "five", limit=4)
    with pytest.raises(OSError, match="null"):
        read_bytes(tmp_path / "a\0b")
    assert read_bytes(tmp_path / "five", limit=5) == b"12345"


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_others_have_left_of_a_shared_file_goes_only_when_nobody_can_be_writing_it(tmp_path):
    path, dead, hour_ago = tmp_path / "a.json", dead_pid(), time.time() - 4000
    ages = {f"a.json.{dead}": hour_ago, f"a.json.{dead}1": None, "a.json.1": hour_ago, "b.json.9": hour_ago}
    for name, age in ages.items():
        temporary = tmp_path / f".{name}.tmp"
        temporary.write_text("half")
        if age:
            os.utime(temporary, (age, age))
    (tmp_path / f".teacher.{dead}.tmp").mkdir()
    write_json(path, {})
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"a.json", f".a.json.{dead}1.tmp", ".a.json.1.tmp", ".b.json.9.tmp", f".teacher.{dead}.tmp"}
    remove_abandoned(path, held=True)
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", ".b.json.9.tmp", f".teacher.{dead}.tmp"}
    remove_abandoned(tmp_path / "teacher", held=True)
    remove_abandoned(tmp_path / "b.json", held=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_with_nothing_but_a_lock_and_leftovers_is_free(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".teacher.12.tmp").mkdir()
    assert is_free(tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="^a.pt cannot be written: .*; what is there is kept$"):
        with writing("a.pt", "what is there is kept"):
            save_tensors_to_a_full_disk(tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_equal_content_has_equal_bytes_whatever_object_it_is_made_of(tmp_path):
    def content(word):
        return {
            "a": word,
            "args": Namespace(x=word, y="".join(["di", "gits"])),
            "list": [(1.5, word)],
            "t": torch.ones(2),
        }

    save_tensors(tmp_path / "a.pt", content("".join(["dig", "its"])))
    save_tensors(tmp_path / "b.pt", content("digits"))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    read = torch.load(tmp_path / "a.pt", weights_only=False)
    assert read["args"] == Namespace(x="digits", y="digits") and read["list"] == [(1.5, "digits")]


def save_tensors_to_a_full_disk(path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        save_tensors(path, {"weight": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# ---- the Hugging Face hub ----


@pytest.fixture(autouse=True)
def forgotten():
    io.is_reachable.cache_clear()
    yield
    io.is_reachable.cache_clear()


def answer(monkeypatch, head):
    class Session:
        pass

    Session.head = staticmethod(head)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)


def refuse(*arguments, **options):
    raise OSError("no network")


def test_one_attempt_tells_and_is_remembered(monkeypatch):
    asked = []
    answer(monkeypatch, lambda url, timeout: asked.append((url, timeout)))
    assert io.is_reachable() and io.is_reachable()
    assert len(asked) == 1 and asked[0][1] == io.HUB_PATIENCE <= 2


def test_an_error_and_silence_are_no_answer(monkeypatch):
    answer(monkeypatch, refuse)
    assert not io.is_reachable()
    io.is_reachable.cache_clear()
    monkeypatch.setattr(io, "HUB_PATIENCE", 0.01)
    answer(monkeypatch, lambda url, timeout: time.sleep(5))
    assert not io.is_reachable()


def test_what_cannot_be_had_is_refused_by_flag_and_the_rest_is_looked_for_at_home(monkeypatch, tmp_path):
    answer(monkeypatch, refuse)
    with pytest.raises(UserError, match="--enc-type must be .* the hub cannot be reached .* got somebody/none"):
        io.require_source("somebody/none", "somebody/none", "--enc-type")
    with pytest.raises(UserError, match="--vae must be a folder .* got .*moved/vae, which does not exist"):
        io.require_source(str(tmp_path / "moved/vae"), str(tmp_path / "moved/vae"), "--vae")
    io.require_source("x", str(tmp_path), "--enc-type")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, name: f"/cache/{source}/{name}")
    io.require_source("somebody/known", "somebody/known", "--enc-type")
    assert io.loading_arguments("somebody/known") == {"local_files_only": True}
    io.is_reachable.cache_clear()
    answer(monkeypatch, lambda url, timeout: None)
    assert io.loading_arguments("somebody/known") == {"local_files_only": False}
    assert io.loading_arguments(str(tmp_path)) == {"local_files_only": True}
