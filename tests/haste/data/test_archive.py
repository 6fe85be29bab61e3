import contextlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import haste.data.archive as archive_module
import pytest
from haste.data.archive import open_archive
from haste.data.images import BadFile
from haste.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(params=["folder", "zip"])
def archive(request, tmp_path):
    """b/2, a.txt and some hidden files."""
    folder = tmp_path / "files"
    for name in ("b/2", "a.txt", ".hidden", "b/._2", "__MACOSX/a.txt", ".cache/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    if request.param == "folder":
        return open_archive(folder, "--data-dir")
    return open_archive(Path(shutil.make_archive(str(folder), "zip", folder)), "--data-dir")


def test_names_are_sorted_and_without_hidden_files(archive):
    assert archive.names() == ["a.txt", "b/2"]
    assert archive.has("b/2") and not archive.has("b/3")


def test_files_are_read_by_name_also_in_another_process(archive):
    assert archive.read("b/2") == b"this is b/2"
    assert pickle.loads(pickle.dumps(archive)).read("a.txt") == b"this is a.txt"
    with pytest.raises(BadFile, match="b/3 is missing"):
        archive.read("b/3")


def test_a_folder_inside_is_an_archive_of_its_own(archive):
    assert archive.child("b").names() == ["2"]
    assert archive.child("b").read("2") == b"this is b/2"
    assert archive.child("c") is None
    assert archive.child("b").locate("2") == archive.locate("b/2")


def test_a_zip_stands_for_the_folder_of_its_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2").write_text("two")
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    assert open_archive(tmp_path, "--data-dir").child("b").read("2") == b"two"


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1").write_text("one")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    assert open_archive(tmp_path / "near", "--data-dir").names() == ["link/1"]


def test_a_link_to_a_folder_around_it_is_passed_over(tmp_path, caplog):
    root = tmp_path / "data"
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "beside").write_text("none of the data")
    (root / "a" / "1").write_text("one")
    for name in ("a/up", "a/again", "a/b/top"):
        (root / name).symlink_to(root)
    (root / "a" / "out").symlink_to(tmp_path)
    (root / "self").symlink_to("self")
    assert open_archive(root, "--data-dir").names() == ["a/1", "self"]
    assert "skipped the link" in caplog.text and "a/again and 3 more" in caplog.text


def test_a_folder_goes_before_a_link_to_it_and_is_read_once(tmp_path):
    root, far = tmp_path / "data", tmp_path / "far" / "x"
    for folder in (root / "z", far):
        folder.mkdir(parents=True)
        (folder / "1").write_text("one")
    (root / "a").symlink_to(root / "z")
    (root / "b").symlink_to(far)
    (root / "c").symlink_to(far)
    (far / "up").symlink_to(far.parent)
    assert open_archive(root, "--data-dir").names() == ["b/1", "z/1"]


def test_a_pipe_is_a_bad_file_and_no_archive(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert open_archive(tmp_path, "--data-dir").names() == ["a.png"]
    with pytest.raises(BadFile, match="a.png cannot be read .it is a pipe, not a regular file"):
        open_archive(tmp_path, "--data-dir").read("a.png")
    with pytest.raises(UserError, match="--data-dir must be a folder or a zip, got .*a.png, which is no regular file"):
        open_archive(tmp_path / "a.png", "--data-dir")


def test_an_entry_of_a_zip_is_read_no_further_than_the_limit(tmp_path, monkeypatch):
    for name, method in (("a.zip", zipfile.ZIP_DEFLATED), ("b.zip", zipfile.ZIP_BZIP2)):
        with zipfile.ZipFile(tmp_path / name, "w", method) as packed:
            packed.writestr("1", bytes(100_000))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "c.zip").write_bytes(data.replace((100_000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    assert len(open_archive(tmp_path / "a.zip", "--data-dir").read("1")) == 100_000
    with pytest.raises(BadFile, match="b.zip/1 is packed by another method than deflate"):
        open_archive(tmp_path / "b.zip", "--data-dir").read("1")
    with pytest.raises(BadFile, match="c.zip/1 cannot be read .Bad CRC"):  # tells of 50 bytes, inflates to more
        open_archive(tmp_path / "c.zip", "--data-dir").read("1")
    monkeypatch.setattr(archive_module, "LARGEST_FILE", 99_999)
    with pytest.raises(BadFile, match="a.zip/1 has 97.7 KiB; at most 97.7 KiB are read"):
        open_archive(tmp_path / "a.zip", "--data-dir").read("1")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60), where=st.integers(0, 200))
def test_any_bytes_in_a_zip_are_files_or_a_refusal(tmp_path_factory, data, where):
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("1", "one")
    whole = path.read_bytes()
    path.write_bytes(whole[:where] + data + whole[where + len(data) :])
    with contextlib.suppress(UserError, BadFile):
        opened = open_archive(path, "--data-dir")
        for name in opened.names():
            opened.read(name)


def test_a_damaged_entry_of_a_zip_is_a_bad_file(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "1").write_bytes(bytes(range(256)) * 8)
    path = Path(shutil.make_archive(str(tmp_path / "files"), "zip", tmp_path / "files"))
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadFile, match="files.zip/1 cannot be read"):
        open_archive(path, "--data-dir").read("1")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="--data-dir must be .*images.tar, which is no zip .unpack other archives"):
        open_archive(tmp_path / "images.tar", "--data-dir")
    with pytest.raises(UserError, match="--source must be .*nothing, which does not exist"):
        open_archive(tmp_path / "nothing", "--source")
