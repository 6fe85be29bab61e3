import pickle
import shutil
from pathlib import Path

import pytest
from haste.data.archive import open_archive
from haste.data.bad_files import BadFile
from haste.errors import UserError


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
    (tmp_path / "pictures.tar").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"--data-dir is .*pictures.tar, which is no zip; .*unpack other archives"):
        open_archive(tmp_path / "pictures.tar", "--data-dir")
    with pytest.raises(UserError, match="--source is .*nothing, which does not exist"):
        open_archive(tmp_path / "nothing", "--source")
