from __future__ import annotations

import pytest
from haste.errors import UserError
from haste.sweep import records as points
from haste.sweep.records import RecordBook

SWEEP, OTHER = {"checkpoint": "0000004.pt", "samples": 70}, {"checkpoint": "0000004.pt", "samples": 80}
A, B = {"num_steps": 50, "cache": "none"}, {"num_steps": 50, "cache": "taylor", "interval": 4}


def test_what_is_kept_is_on_the_disk_and_belongs_to_its_sweep_and_point(tmp_path):
    book = RecordBook(tmp_path / "sweep.jsonl")
    book.keep(SWEEP, A, fd=1.0)
    book.keep(SWEEP, A, seconds=[0.5])
    book.keep(OTHER, A, fd=3.0)
    again = RecordBook(tmp_path / "sweep.jsonl")
    assert again.find(SWEEP, A) == {"sweep": SWEEP, "point": A, "fd": 1.0, "seconds": [0.5]}
    assert again.find(OTHER, A)["fd"] == 3.0
    assert again.find(SWEEP, B) == {"sweep": SWEEP, "point": B}


def test_only_points_that_were_timed_are_complete_and_the_last_sweep_is_the_default(tmp_path):
    book = RecordBook(tmp_path / "sweep.jsonl")
    assert book.of() == []
    book.keep(SWEEP, A, seconds=[0.5])
    book.keep(SWEEP, B, fd=1.0)
    assert [record["point"] for record in book.of(SWEEP)] == [A]
    book.keep(OTHER, B, seconds=[0.5])
    assert [record["sweep"] for record in book.of()] == [OTHER]


def test_a_kill_while_writing_leaves_what_was_known(tmp_path, monkeypatch):
    book = RecordBook(tmp_path / "sweep.jsonl")
    book.keep(SWEEP, A, fd=1.0)

    def killed(path, write):
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        book.keep(SWEEP, A, fd=2.0)
    assert RecordBook(tmp_path / "sweep.jsonl").find(SWEEP, A)["fd"] == 1.0


@pytest.mark.parametrize("line", [b'{"step": 3}', b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_holds_other_lines_is_refused(tmp_path, line):
    path = tmp_path / "sweep.jsonl"
    path.write_bytes(b'{"sweep": {}, "point": {}}\n' + line)
    with pytest.raises(UserError, match=r"line 2 of .*sweep\.jsonl must be a record of haste sweep, "):
        RecordBook(path)
