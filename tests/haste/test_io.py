import json
import os
from pathlib import Path

import pytest
from haste.errors import UserError
from haste.io import holds_nothing, read_bytes, read_json, remove_leftovers, require_space, write_atomically, write_json


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
    assert holds_nothing(tmp_path / "new") and holds_nothing(tmp_path)
    (tmp_path / ".a.json.123.tmp").write_text("half")
    assert holds_nothing(tmp_path)
    (tmp_path / ".notes.tmp").write_text("the user's own")
    assert not holds_nothing(tmp_path)
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".notes.tmp"]
    assert not holds_nothing(tmp_path / ".notes.tmp")


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
        with pytest.raises(UserError, match=f"must be a record, and cannot be read: {reason}"):
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
