"""Folders, zips and the arrays of .npy and .npz files, whole, damaged and hostile."""

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import haste.data.archive as archive_module
import numpy as np
import pytest
from haste.data.archive import list_npz, open_archive, read_array, read_npy, read_npz
from haste.errors import BadFile, UserError
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
    with pytest.raises(BadFile, match="b.zip/1 is compressed by another method than deflate"):
        open_archive(tmp_path / "b.zip", "--data-dir").read("1")
    with pytest.raises(BadFile, match="c.zip/1 cannot be read .Bad CRC"):  # claims 50 bytes, inflates to more
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


def npy(array: np.ndarray, **changes) -> bytes:
    """An .npy file, with other things in its header than are true."""
    file = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **changes}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "i8", "u1", "?", "U5", "c8"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5)])
def test_numbers_and_text_are_read_as_numpy_reads_them(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(array, order=order))
        read = read_npy(tmp_path / "a.npy")
        assert read.dtype == array.dtype and read.shape == array.shape and (read == array).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_of_an_npz_those_are_read_that_are_asked_for_and_there(tmp_path, save):
    save(tmp_path / "a.npz", mu=np.arange(3.0), other=np.zeros(2), extractor=np.array("digits"))
    assert list_npz(tmp_path / "a.npz") == ["mu", "other", "extractor"]
    read = read_npz(tmp_path / "a.npz", ("mu", "extractor", "sigma"))
    assert read.keys() == {"mu", "extractor"}
    assert read["mu"].tolist() == [0, 1, 2] and str(read["extractor"]) == "digits"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros(3), shape=(2**40,)), "its header claims 8 TiB"),
        (npy(np.zeros(3), shape=(4,)), "it is truncated: its header claims 32 bytes"),
        (npy(np.zeros(3), shape=(-1, -3)), "it must hold numbers or text"),
        (npy(np.zeros(3), descr="|O"), "it must hold numbers or text"),
        (npy(np.zeros(3), descr="|S0", shape=(2**60,)), "it must hold numbers or text"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "its header has 2 GiB; at most 64 KiB"),
        (b"text", "it is no .npy file"),
        (b"", "it is no .npy file"),
        (b"\x93NUMPY\x01\x00", "it is truncated"),
    ],
)
def test_what_a_header_asks_for_is_held_against_what_is_there(tmp_path, data, reason):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadFile, match=f"a.npy cannot be read as an .npy file: .*{reason}"):
        read_npy(tmp_path / "a.npy")


def test_an_array_that_inflates_to_many_times_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "SMALL_ARRAY", 1000)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(100_000), b=np.random.default_rng(0).random(1000))
    assert len(read_npz(tmp_path / "a.npz", ["b"])["b"]) == 1000
    with pytest.raises(BadFile, match="has no readable a: .* inflate to 781 KiB; at most 100 to one"):
        read_npz(tmp_path / "a.npz", ["a"])
    monkeypatch.setattr(archive_module, "LARGEST_ARRAY", 999)
    with pytest.raises(BadFile, match="it has 7.81 KiB; at most 999 bytes are read"):
        read_npz(tmp_path / "a.npz", ["b"])


def test_methods_that_inflate_without_a_bound_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", npy(np.zeros(100)))
    with pytest.raises(BadFile, match="compressed by another method than deflate"):
        read_npz(tmp_path / "a.npz", ["a"])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.text(max_size=20), st.integers(-(2**70), 2**70))
def test_any_bytes_after_a_good_beginning_are_an_array_or_an_error(data, descr, side):
    header = json.dumps({"descr": descr, "fortran_order": False, "shape": "SHAPE"}).replace('"SHAPE"', f"({side},)")
    header = header.replace("false", "False").encode("latin1", "replace")
    for file in (data, b"\x93NUMPY" + data, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data):
        try:
            assert read_array(io.BytesIO(file), len(file)).nbytes <= len(file)
        except Exception as error:  # what read_npy turns into a BadFile
            assert not isinstance(error, MemoryError)
