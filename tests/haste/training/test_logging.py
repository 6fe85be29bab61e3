"""Metrics, the log and what waits for a disk."""

from __future__ import annotations

import errno
import json
import logging
import math
import os

import pytest
import torch
from accelerate import Accelerator
from haste.errors import UserError
from haste.models import SiT, get_family
from haste.resumable import read_lines
from haste.training.config import TrainConfig
from haste.training.logging import Backlog, Metrics, alignment_end, peak_teraflops, read_log, with_present_names
from torch.utils.flop_counter import FlopCounterMode

TINY = {"hidden_size": 16, "patch_size": 2, "input_size": 8, "in_channels": 1, "depth": 3}


@pytest.fixture
def make_metrics():
    def make(watch_gradient=True, passes=1):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = None if watch_gradient else object()
        return Metrics(accelerator, TrainConfig(batch_size=4, gradient_accumulation_steps=passes), TINY)

    return make


def one_micro_batch(metrics, loss, attention=None):
    scalar = torch.tensor
    metrics.add(scalar(loss), None, None if attention is None else scalar(attention), scalar(10 * loss))


def step(metrics, loss, grad_norm=1.0, attention=None):
    one_micro_batch(metrics, loss, attention)
    metrics.add_norm(torch.tensor(grad_norm))


def test_it_reads_means_since_the_last_time(make_metrics):
    metrics = make_metrics()
    assert metrics.read(0) is None
    step(metrics, 1.0, grad_norm=3.0, attention=2.0)
    step(metrics, 3.0, grad_norm=5.0, attention=4.0)
    record = metrics.read(2)
    assert record.pop("images_per_second") > 0 and record.pop("teraflops") > 0 and record.pop("peak_memory_gib") > 0
    assert record.pop("mfu") is None  # nobody says what this processor could do
    assert record == {
        "loss": 2.0, "proj_loss": None, "attn_loss": 3.0, "disp_loss": None, "cls_loss": None, "sra_loss": None,
        "total_loss": 20.0, "grad_norm": 4.0, "skipped_steps": 0,
    }  # fmt: skip
    step(metrics, 7.0)
    assert metrics.read(3)["loss"] == 7.0
    assert metrics.read(3) is None


def test_what_comes_between_two_steps_is_not_counted(make_metrics, monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 100.0, 104.0, 104.0])
    monkeypatch.setattr("haste.training.logging.time.perf_counter", lambda: next(clock))
    metrics = make_metrics()  # begins at 0
    step(metrics, 1.0)
    assert metrics.read(1)["images_per_second"] == 4 / 2
    metrics.start_clock()  # at 100, after a checkpoint that took 98 seconds
    step(metrics, 1.0)
    assert metrics.read(2)["images_per_second"] == 4 / 4


def test_a_step_of_several_passes_counts_once(make_metrics):
    metrics = make_metrics(passes=2)
    one_micro_batch(metrics, 1.0)
    step(metrics, 2.0)
    step(metrics, 4.5)
    assert metrics.read(2)["loss"] == 3.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_first_step_that_is_not_finite_is_named(make_metrics, loss):
    metrics = make_metrics()
    for value in (1.0, loss, 1.0, math.nan):
        step(metrics, value)
    with pytest.raises(UserError, match="not finite at step 98 "):
        metrics.read(100)


def test_an_infinite_gradient_is_an_error_only_where_it_is_watched(make_metrics):
    for watch in (True, False):
        metrics = make_metrics(watch)
        step(metrics, 1.0, grad_norm=math.inf)
        if watch:
            with pytest.raises(UserError, match="not finite at step 1 "):
                metrics.read(1)
        else:
            assert metrics.read(1)["loss"] == 1.0


def test_logs_with_the_former_names_are_read_as_the_present_ones():
    former = {"step": 3, "loss": 9.0, "velocity_loss": 1.0, "feature_loss": -0.5, "attention_loss": None,
              "grad_norm": 2.0, "aligned": True}  # fmt: skip
    present = {"step": 3, "aligned": True, "loss": 1.0, "proj_loss": -0.5, "attn_loss": None, "total_loss": 9.0,
               "grad_norm": 2.0}  # fmt: skip
    assert with_present_names(former) == present
    assert with_present_names(present) == present


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_written_waits_in_its_order_and_is_reported_once(caplog):
    disk, written = {"full": False}, []

    def write(number):
        return lambda: full() if disk["full"] else written.append(number)

    backlog = Backlog("the log")
    with caplog.at_level(logging.WARNING):
        for number, disk["full"] in enumerate([False, True, True, False]):
            backlog.add(write(number))
            assert len(backlog) == (number if disk["full"] else 0)
    assert written == [0, 1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "the log cannot be written, and training goes on: [Errno 28]" in caplog.text


def test_the_end_says_what_is_lost(caplog):
    backlog = Backlog("the log")
    for _ in range(2):
        backlog.add(full)
    backlog.close()
    assert "the log lacks the last 2 entries" in caplog.text


def test_another_error_is_a_bug():
    with pytest.raises(KeyError):
        Backlog("the log").add(lambda: {}["missing"])


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

    monkeypatch.setattr("haste.resumable.read_bytes", refuse)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read: Permission denied"):
        read_log(path)


def test_the_end_of_alignment_is_read_off_the_log():
    def lines(*aligned):
        return [{"step": step, "aligned": one} for step, one in enumerate(aligned, start=1)]

    assert alignment_end(lines(True, True, False, False)) == 2
    assert alignment_end(lines(True, True)) is None
    assert alignment_end(lines(False, False)) is None
    assert alignment_end([]) is None


SHAPE = {"input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 3, "num_heads": 4}


def test_operations_are_those_that_torch_counts():
    model = SiT(**SHAPE, num_classes=10, fused_attn=False).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2])).prediction.sum().backward()
    # The time embedding and the last adaLN are left out, and images need no gradient.
    assert get_family("sit").training_flops(SHAPE) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


def test_the_peak_is_known_by_the_devices_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_teraflops(torch.device("cuda"), "bf16") == 989
    assert peak_teraflops(torch.device("cuda"), "no") is None
    assert peak_teraflops(torch.device("cpu"), "bf16") is None
