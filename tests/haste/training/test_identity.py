from __future__ import annotations

import os

import pytest
import torch
from haste.errors import UserError
from haste.training.checkpoint import PIECE, PIECES, as_before, checkpoint_identity, content_digest


def saved(path, value=1.0, **options):
    torch.save({"model": torch.full((300,), value), "steps": 4}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_the_content_decides_and_neither_the_name_nor_the_time(tmp_path, zipped):
    options = {"_use_new_zipfile_serialization": zipped}
    first = saved(tmp_path / "a.pt", **options)
    digest = content_digest(first)
    os.utime(first, ns=(1, 1))
    copy = tmp_path / "b.pt"
    copy.write_bytes(first.read_bytes())
    assert digest == content_digest(first) == content_digest(copy) and len(digest) == 12
    assert checkpoint_identity(copy) == {"checkpoint": "b.pt", "checkpoint_digest": digest}
    assert as_before(checkpoint_identity(first), first) == {"checkpoint": "a.pt", "checkpoint_written": 1}
    assert content_digest(saved(tmp_path / "a.pt", 1.5, **options)) != digest


def test_the_same_content_saved_under_another_name_is_the_same(tmp_path):
    assert content_digest(saved(tmp_path / "a.pt")) == content_digest(saved(tmp_path / ".a.pt.7.tmp"))


def test_not_a_byte_of_the_data_of_a_zip_file_is_read(tmp_path):
    path = saved(tmp_path / "a.pt")
    digest, data = content_digest(path), bytearray(path.read_bytes())
    start = data.index(torch.ones(300).numpy().tobytes())
    data[start : start + 1200] = bytes(1200)
    path.write_bytes(data)
    assert content_digest(path) == digest


@pytest.mark.parametrize("size", [0, 5, PIECE * PIECES])
def test_a_file_without_checksums_is_read_whole_up_to_4_mib(tmp_path, size):
    path = tmp_path / "a.safetensors"
    digests = set()
    for changed in (None, *range(0, size, 5 * PIECE + 1)):
        path.write_bytes(b"\0" * size)
        if changed is not None:
            with open(path, "r+b") as file:
                file.seek(changed)
                file.write(b"\1")
        digests.add(content_digest(path))
    assert len(digests) == 1 + len(range(0, size, 5 * PIECE + 1))


def test_of_a_larger_file_the_size_the_ends_and_pieces_between_are_told(tmp_path):
    path, size, digests = tmp_path / "a.safetensors", 3 * PIECE * PIECES, set()
    for length, changed in [(size, 0), (size, size // 2), (size, size - 1), (size + 1, 0)]:
        with open(path, "wb") as file:
            file.truncate(length)
            file.seek(changed)
            file.write(bytes([1]) * min(3 * PIECE, length - changed))
        digests.add(content_digest(path))
    assert len(digests) == 4


def test_a_damaged_file_has_a_digest_and_what_is_none_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:-50])
    assert len(content_digest(path)) == 12
    for name in ("none.pt", "pipe.pt"):
        if name == "pipe.pt":
            os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"the checkpoint .*{name} does not exist"):
            content_digest(tmp_path / name)
