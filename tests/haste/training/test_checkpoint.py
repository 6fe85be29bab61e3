from __future__ import annotations

import argparse
import logging
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.io import remove_leftovers, write_atomically
from haste.training.checkpoint import (
    BrokenCheckpoint,
    Retention,
    capture_rng,
    checkpoint_path,
    list_checkpoints,
    load_model,
    read_checkpoint,
    read_newest_checkpoint,
    restore_rng,
    save_checkpoint,
)
from haste.training.trainer import train


def small_checkpoint(step: int) -> dict:
    weights = {"w": torch.full((1000,), float(step))}
    opt = {"state": {}, "param_groups": []}
    return {"model": weights, "ema": weights, "opt": opt, "args": argparse.Namespace(seed=step), "steps": step}


def resumable_checkpoint(step: int) -> dict:
    return {**small_checkpoint(step), "model_config": {}, "rng": None, "termination": None, "scaler": None}


def test_what_is_written_is_read(tmp_path):
    path = checkpoint_path(tmp_path, 400)
    assert path.name == "0000400.pt"
    save_checkpoint(path, small_checkpoint(400))
    back = read_checkpoint(path)
    assert back["args"] == argparse.Namespace(seed=400)
    assert torch.equal(back["model"]["w"], torch.full((1000,), 400.0))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "0000001.pt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["0000001.pt"]
    assert path.read_text() == "old"


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_no_other_class_is_admitted(tmp_path, capsys):
    checkpoint = small_checkpoint(1)
    checkpoint["args"] = Evil()
    torch.save(checkpoint, checkpoint_path(tmp_path, 1))
    with pytest.raises(UserError, match=r"args of .*0000001.pt must hold named settings, and is a builtins.print"):
        read_newest_checkpoint(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BrokenCheckpoint):
        read_checkpoint(tmp_path / "plain.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt lacks model, so a run cannot go on from it; .* --init-from"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_a_newest_file_that_is_cut_short_gives_way_to_the_one_before(tmp_path, caplog, kept):
    save_checkpoint(checkpoint_path(tmp_path, 4), resumable_checkpoint(4))
    newest = checkpoint_path(tmp_path, 8)
    save_checkpoint(newest, resumable_checkpoint(8))
    newest.write_bytes(newest.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        assert read_newest_checkpoint(tmp_path)["steps"] == 4
    assert "0000008.pt is no whole checkpoint" in caplog.text


def test_a_damaged_byte_is_noticed(tmp_path):
    path = checkpoint_path(tmp_path, 4)
    save_checkpoint(path, small_checkpoint(4))
    data = bytearray(path.read_bytes())
    position = data.find(torch.full((8,), 4.0).numpy().tobytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(BrokenCheckpoint):
        read_checkpoint(path)


def test_the_newest_or_the_wanted_step(tmp_path):
    assert read_newest_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        save_checkpoint(checkpoint_path(tmp_path, step), resumable_checkpoint(step))
    (tmp_path / ".0000016.pt.99.tmp").write_text("left behind by a kill")
    assert read_newest_checkpoint(tmp_path)["steps"] == 12
    assert read_newest_checkpoint(tmp_path, step=8)["steps"] == 8
    with pytest.raises(UserError, match=r"--resume-step is 5, and .*0000005\.pt does not exist"):
        read_newest_checkpoint(tmp_path, step=5)


def test_what_another_trainers_checkpoint_lacks_is_none(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 4), small_checkpoint(4))
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint["steps"] == 4
    assert [checkpoint[name] for name in ("rng", "termination", "scaler")] == [None] * 3


def test_what_a_kill_left_behind_is_removed(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 4), small_checkpoint(4))
    (tmp_path / ".0000008.pt.99.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000004.pt"]


def kept(folder):
    return [int(path.stem) for path in list_checkpoints(folder)]


def test_keep_leaves_the_newest(tmp_path):
    retention = Retention(tmp_path, 2)
    for step in (4, 8, 12, 16):
        save_checkpoint(checkpoint_path(tmp_path, step), small_checkpoint(step))
        retention.written(checkpoint_path(tmp_path, step))
    assert kept(tmp_path) == [12, 16]
    Retention(tmp_path, 0).written(checkpoint_path(tmp_path, 16))
    assert kept(tmp_path) == [12, 16]


@pytest.mark.parametrize("keep, left", [(1, [8, 16, 20]), (2, [8, 12, 16, 20])])
def test_keep_neither_counts_nor_deletes_what_is_damaged_or_newer(tmp_path, caplog, keep, left):
    for step in (4, 8, 12, 16, 20):
        save_checkpoint(checkpoint_path(tmp_path, step), small_checkpoint(step))
    for step in (8, 20):
        path = checkpoint_path(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-100])
    retention = Retention(tmp_path, keep)
    for _ in range(2):
        retention.written(checkpoint_path(tmp_path, 16))
    assert kept(tmp_path) == left
    assert caplog.text.count("0000008.pt is damaged; --keep neither counts nor deletes it") == 1


def test_when_no_file_is_whole_training_does_not_start_over(tmp_path):
    checkpoint_path(tmp_path, 4).write_text("")
    with pytest.raises(UserError, match="none of the 1 checkpoints .* is whole"):
        read_newest_checkpoint(tmp_path)


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)

    draw()
    np.random.normal()  # leaves a cached second value behind
    save_checkpoint(tmp_path / "0.pt", {**small_checkpoint(0), "rng": capture_rng()})
    expected = draw()
    restore_rng(read_checkpoint(tmp_path / "0.pt")["rng"])
    assert draw() == expected


@pytest.mark.parametrize("step", [4, 8])  # with projectors, and after they were released
def test_load_model_gives_the_student_alone(make_config, step):
    config = make_config(max_train_steps=8, ema_decay=0.5)
    path = checkpoint_path(train(config).folder / "checkpoints", step)
    averaged, back = load_model(path)
    trained, _ = load_model(path, ema=False)
    assert back == replace(config, num_classes=10)  # as the data has
    assert not averaged.training and len(averaged.projectors) == 0
    saved = read_checkpoint(path)
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(averaged.state_dict()[weight], saved["ema"][weight])
    assert torch.equal(trained.state_dict()[weight], saved["model"][weight])
    assert not torch.equal(saved["ema"][weight], saved["model"][weight])
    output = averaged(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10]))
    assert output.velocity.shape == (2, 1, 8, 8)


def test_load_model_refuses_what_is_not_there_or_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is no whole checkpoint"):
        load_model(tmp_path / "text.pt")
    save_checkpoint(tmp_path / "other.pt", small_checkpoint(1))
    with pytest.raises(UserError, match="other.pt cannot be used: .* not those of a SiT: pos_embed is missing"):
        load_model(tmp_path / "other.pt")


def test_a_run_does_not_go_on_from_a_file_of_sits_own_trainer(tmp_path):
    path = checkpoint_path(tmp_path, 4)
    save_checkpoint(path, {name: value for name, value in small_checkpoint(4).items() if name != "steps"})
    with pytest.raises(UserError, match="lacks steps, so a run cannot go on from it; begin a new one with --init-from"):
        read_newest_checkpoint(tmp_path)


def test_only_a_damaged_file_gives_way_to_an_earlier_one(tmp_path):
    """A file that is whole and cannot be read stops, so that its steps are not trained again without a word."""
    save_checkpoint(checkpoint_path(tmp_path, 4), resumable_checkpoint(4))
    save_checkpoint(checkpoint_path(tmp_path, 8), {**resumable_checkpoint(8), "args": Evil()})
    with pytest.raises(UserError, match=r"0000008\.pt must hold named settings, and is a builtins\.print"):
        read_newest_checkpoint(tmp_path)


@pytest.mark.parametrize("args", [None, {"seed": 3}])
def test_settings_may_be_a_dictionary_or_missing(tmp_path, args):
    save_checkpoint(checkpoint_path(tmp_path, 4), {**small_checkpoint(4), "args": args})
    assert vars(read_newest_checkpoint(tmp_path)["args"]) == (args or {})
