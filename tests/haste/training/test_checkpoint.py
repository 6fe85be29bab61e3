"""Checkpoints are written whole, read by one reader, and known by their content."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.io import remove_leftovers, save_tensors, write_atomically
from haste.models import SiT
from haste.training.checkpoint import (
    PIECE,
    PIECES,
    BrokenCheckpoint,
    as_before,
    capture_rng,
    checkpoint_identity,
    checkpoint_path,
    content_digest,
    dense_weights,
    list_checkpoints,
    loaded_model,
    read_checkpoint,
    read_newest_checkpoint,
    read_parts,
    restore_rng,
    sampling_config,
)
from haste.training.config import resolve
from haste.training.run_dir import Retention
from haste.training.trainer import train
from small_models import WITH_PROJECTORS, random_sit

SMALL = {
    "depth": 1, "hidden_size": 8, "num_heads": 1, "patch_size": 2, "input_size": 4, "in_channels": 1, "num_classes": 2,
}  # fmt: skip


def small_checkpoint(step: int) -> dict:
    weights = {name: torch.full_like(value, step) for name, value in SiT(**SMALL).state_dict().items()}
    parts = {"model": weights, "ema": weights, "opt": {"state": {}, "param_groups": []}, "model_config": SMALL}
    return {**parts, "args": argparse.Namespace(seed=step), "steps": step}


def resumable_checkpoint(step: int) -> dict:
    return {**small_checkpoint(step), "rng": None, "termination": None, "scaler": None}


def test_what_is_written_is_read(tmp_path):
    path = checkpoint_path(tmp_path, 400)
    assert path.name == "0000400.pt"
    save_tensors(path, small_checkpoint(400))
    back = read_checkpoint(path)
    assert back["args"] == {"seed": 400}
    assert torch.equal(back["model"]["pos_embed"], torch.full((1, 4, 8), 400.0))


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
    with pytest.raises(UserError, match=r"args of .*0000001.pt must be named settings, got a builtins.print"):
        read_newest_checkpoint(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BrokenCheckpoint):
        read_checkpoint(tmp_path / "plain.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt cannot be used: .* of one of .*SiT"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_a_newest_file_that_is_cut_short_gives_way_to_the_one_before(tmp_path, caplog, kept):
    save_tensors(checkpoint_path(tmp_path, 4), resumable_checkpoint(4))
    newest = checkpoint_path(tmp_path, 8)
    save_tensors(newest, resumable_checkpoint(8))
    newest.write_bytes(newest.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        assert read_newest_checkpoint(tmp_path)["steps"] == 4
    assert "0000008.pt is not a valid checkpoint" in caplog.text


def test_a_damaged_byte_is_noticed(tmp_path):
    path = checkpoint_path(tmp_path, 4)
    save_tensors(path, small_checkpoint(4))
    data = bytearray(path.read_bytes())
    position = data.find(torch.full((8,), 4.0).numpy().tobytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(BrokenCheckpoint):
        read_checkpoint(path)


def test_the_newest_or_the_wanted_step(tmp_path):
    assert read_newest_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        save_tensors(checkpoint_path(tmp_path, step), resumable_checkpoint(step))
    (tmp_path / ".0000016.pt.99.tmp").write_text("left behind by a kill")
    assert read_newest_checkpoint(tmp_path)["steps"] == 12
    assert read_newest_checkpoint(tmp_path, step=8)["steps"] == 8
    with pytest.raises(UserError, match=r"--resume-step must be the step of a checkpoint in .*, got 5"):
        read_newest_checkpoint(tmp_path, step=5)


def test_what_another_trainers_checkpoint_lacks_is_none(tmp_path):
    save_tensors(checkpoint_path(tmp_path, 4), small_checkpoint(4))
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint["steps"] == 4
    assert [checkpoint[name] for name in ("rng", "termination", "scaler")] == [None] * 3


def test_what_a_kill_left_behind_is_removed(tmp_path):
    save_tensors(checkpoint_path(tmp_path, 4), small_checkpoint(4))
    (tmp_path / ".0000008.pt.99.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000004.pt"]


def kept(folder):
    return [int(path.stem) for path in list_checkpoints(folder)]


def test_keep_leaves_the_newest(tmp_path):
    retention = Retention(tmp_path, 2)
    for step in (4, 8, 12, 16):
        save_tensors(checkpoint_path(tmp_path, step), small_checkpoint(step))
        retention.written(checkpoint_path(tmp_path, step))
    assert kept(tmp_path) == [12, 16]
    Retention(tmp_path, 0).written(checkpoint_path(tmp_path, 16))
    assert kept(tmp_path) == [12, 16]


@pytest.mark.parametrize("keep, left", [(1, [8, 16, 20]), (2, [8, 12, 16, 20])])
def test_keep_neither_counts_nor_deletes_what_is_damaged_or_newer(tmp_path, caplog, keep, left):
    for step in (4, 8, 12, 16, 20):
        save_tensors(checkpoint_path(tmp_path, step), small_checkpoint(step))
    for step in (8, 20):
        path = checkpoint_path(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-100])
    retention = Retention(tmp_path, keep)
    for _ in range(2):
        retention.written(checkpoint_path(tmp_path, 16))
    assert kept(tmp_path) == left
    assert caplog.text.count("0000008.pt is damaged; --checkpoints-total-limit neither counts nor deletes it") == 1


def test_when_no_file_is_whole_training_does_not_start_over(tmp_path):
    checkpoint_path(tmp_path, 4).write_text("")
    with pytest.raises(UserError, match="all 1 checkpoints .* are damaged"):
        read_newest_checkpoint(tmp_path)


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)

    draw()
    np.random.normal()  # leaves a cached second value behind
    save_tensors(tmp_path / "0.pt", {**small_checkpoint(0), "rng": capture_rng()})
    expected = draw()
    restore_rng(read_checkpoint(tmp_path / "0.pt")["rng"])
    assert draw() == expected


@pytest.mark.parametrize("step", [4, 8])  # with projectors, and after they were released
def test_the_model_of_a_checkpoint_comes_without_projectors(make_config, step):
    config = make_config(max_train_steps=8, ema_decay=0.5)
    path = checkpoint_path(train(config).folder / "checkpoints", step)
    checkpoint = read_checkpoint(path)
    averaged, trained = loaded_model(checkpoint), loaded_model(checkpoint, ema=False)
    assert sampling_config(checkpoint, path) == resolve(config, 10)
    assert not averaged.training and len(averaged.projectors) == 0
    saved = read_checkpoint(path)
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(averaged.state_dict()[weight], saved["ema"][weight])
    assert torch.equal(trained.state_dict()[weight], saved["model"][weight])
    assert not torch.equal(saved["ema"][weight], saved["model"][weight])
    output = averaged(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10]))
    assert output.prediction.shape == (2, 1, 8, 8)


def test_what_is_not_there_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is not a valid checkpoint"):
        read_checkpoint(tmp_path / "text.pt")
    save_tensors(tmp_path / "other.pt", {"model": {"w": torch.ones(3)}})
    with pytest.raises(UserError, match="other.pt cannot be used: .* of one of .*SiT"):
        read_checkpoint(tmp_path / "other.pt")


def test_a_run_does_not_go_on_from_a_file_of_sits_own_trainer(tmp_path):
    path = checkpoint_path(tmp_path, 4)
    save_tensors(path, {name: value for name, value in small_checkpoint(4).items() if name != "opt"})
    with pytest.raises(UserError, match="lacks opt, so a run cannot be resumed .* --init-from"):
        read_newest_checkpoint(tmp_path)


def test_only_a_damaged_file_gives_way_to_an_earlier_one(tmp_path):
    """A file that is whole and cannot be read stops, so that its steps are not trained again without a word."""
    save_tensors(checkpoint_path(tmp_path, 4), resumable_checkpoint(4))
    save_tensors(checkpoint_path(tmp_path, 8), {**resumable_checkpoint(8), "args": Evil()})
    with pytest.raises(UserError, match=r"0000008\.pt must be named settings, got a builtins\.print"):
        read_newest_checkpoint(tmp_path)


@pytest.mark.parametrize("args", [None, {"seed": 3}])
def test_settings_may_be_a_dictionary_or_missing(tmp_path, args):
    save_tensors(checkpoint_path(tmp_path, 4), {**small_checkpoint(4), "args": args})
    assert read_newest_checkpoint(tmp_path)["args"] == (args or {})


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


# ---- weights of any trainer ----


FILE = Path("0400000.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_names_of_wrappers_are_taken_off(prefix):
    weights = random_sit(**WITH_PROJECTORS).state_dict()
    wrapped = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in weights.items()}
    both = read_parts({"model": weights, "ema": wrapped}, FILE)
    assert list(both["ema"]) == list(weights)
    with pytest.raises(UserError, match="got a with and without"):
        dense_weights({"a": torch.ones(1), "module.a": torch.ones(1)}, "it")


@pytest.mark.parametrize("ema", [None, {}, "absent"])
def test_without_averaged_weights_the_trained_ones_serve_for_both(ema):
    weights = random_sit(**WITH_PROJECTORS).state_dict()
    content = {"model": weights} if ema == "absent" else {"model": weights, "ema": ema}
    both = read_parts({**content, "steps": 4}, FILE)
    assert all(both["ema"][name] is both["model"][name] for name in weights)
    both = read_parts({"state_dict": weights, "epoch": 4}, FILE)
    assert list(both["ema"]) == list(weights)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.ones(2, dtype=torch.int64), "int64"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to_sparse(), "sparse, nested or quantized"),
        (torch.ones(2, device="meta"), "on meta, without values"),
        (torch.ones(1).expand(10**6, 10**6), "of shape (1000000, 1000000), for which the file has too few values"),
    ],
)
def test_what_is_no_weight_is_refused(value, why):
    with pytest.raises(UserError) as refusal:
        dense_weights({"a": torch.ones(2), "b": value}, "ema of it")
    assert str(refusal.value) == f"ema of it must hold dense floating-point weights, got b, which is {why}"


def test_weights_of_another_architecture_are_named(tmp_path):
    weights = random_sit(**WITH_PROJECTORS).state_dict()
    del weights["blocks.1.mlp.fc1.bias"]
    weights["blocks.1.mlp.w12.bias"] = torch.ones(4)
    torch.save({"model": weights, "steps": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.w12\.bias does not belong and blocks\.1\.mlp\.fc1\.bias is"):
        read_checkpoint(tmp_path / "other.pt")
