import io
import json
import zipfile

import numpy as np
import pytest
from haste.data import archive
from haste.data.archive import list_npz, read_array, read_npy, read_npz
from haste.data.images import BadFile
from hypothesis import given, settings
from hypothesis import strategies as st


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
        (npy(np.zeros(3), shape=(2**40,)), "its header tells of 8 TiB"),
        (npy(np.zeros(3), shape=(4,)), "it is cut short: its header tells of 32 bytes"),
        (npy(np.zeros(3), shape=(-1, -3)), "no array of numbers or text"),
        (npy(np.zeros(3), descr="|O"), "no array of numbers or text"),
        (npy(np.zeros(3), descr="|S0", shape=(2**60,)), "no array of numbers or text"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "its header has 2 GiB; at most 64 KiB"),
        (b"text", "it does not begin as an .npy file"),
        (b"", "it does not begin as an .npy file"),
        (b"\x93NUMPY\x01\x00", "it is cut short"),
    ],
)
def test_what_a_header_asks_for_is_held_against_what_is_there(tmp_path, data, reason):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadFile, match=f"a.npy cannot be read as an .npy file: .*{reason}"):
        read_npy(tmp_path / "a.npy")


def test_an_array_that_inflates_to_many_times_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "SMALL_ARRAY", 1000)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(100_000), b=np.random.default_rng(0).random(1000))
    assert len(read_npz(tmp_path / "a.npz", ["b"])["b"]) == 1000
    with pytest.raises(BadFile, match="has no a that can be read: .* inflate to 781 KiB; at most 100 to one"):
        read_npz(tmp_path / "a.npz", ["a"])
    monkeypatch.setattr(archive, "LARGEST_ARRAY", 999)
    with pytest.raises(BadFile, match="it has 7.81 KiB; at most 999 bytes are read"):
        read_npz(tmp_path / "a.npz", ["b"])


def test_methods_that_inflate_without_a_bound_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", npy(np.zeros(100)))
    with pytest.raises(BadFile, match="packed by another method than deflate"):
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
