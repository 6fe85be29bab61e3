from __future__ import annotations

import json
import os

import pytest
from haste.errors import UserError
from haste.training import logging
from haste.training.logging import alignment_end, read_lines, read_log


def write(path, *lines, end="\n"):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


def test_losses_have_todays_names_in_logs_of_any_age(tmp_path):
    old = {"step": 1, "aligned": True, "loss": 3.0, "velocity_loss": 2.0, "feature_loss": 0.5, "attention_loss": None,
           "grad_norm": 1.0}  # fmt: skip
    new = {"step": 2, "aligned": True, "loss": 2.0, "proj_loss": 0.5, "attn_loss": None, "total_loss": 3.0,
           "grad_norm": 1.0}  # fmt: skip
    first, second = read_log(write(tmp_path / "log.jsonl", old, new)).lines
    assert {**first, "step": 2} == second == new


def test_a_step_counts_as_it_was_logged_last(tmp_path):
    lines = [{"step": step, "aligned": False, "loss": loss} for step, loss in ((1, 9.0), (2, 8.0), (1, 7.0))]
    read = read_log(write(tmp_path / "log.jsonl", *lines)).lines
    assert [(line["step"], line["loss"]) for line in read] == [(1, 7.0), (2, 8.0)]


def test_damage_is_counted_but_for_a_line_cut_short(tmp_path):
    whole = {"step": 1, "aligned": True, "loss": float("nan"), "grad_norm": "large"}
    path = write(tmp_path / "log.jsonl", "\0\0\0", "[1]", {"aligned": True}, {"step": -1}, whole, '{"step', end="")
    log = read_log(path)
    assert log.damaged == 4 and log.lines == [{"step": 1, "aligned": True, "loss": None, "grad_norm": None}]
    assert read_lines(tmp_path / "none.jsonl") == ([], 0)


def test_a_log_that_is_a_folder_or_a_pipe_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=f"{name} cannot be read: it is a {name}, not a regular file"):
            read_lines(tmp_path / name)


def test_a_log_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "log.jsonl", {"step": 1})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(logging, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read: Permission denied"):
        read_log(path)


def test_the_end_of_alignment_is_read_off_the_log():
    def lines(*aligned):
        return [{"step": step, "aligned": one} for step, one in enumerate(aligned, start=1)]

    assert alignment_end(lines(True, True, False, False)) == 2
    assert alignment_end(lines(True, True)) is None
    assert alignment_end(lines(False, False)) is None
    assert alignment_end([]) is None
