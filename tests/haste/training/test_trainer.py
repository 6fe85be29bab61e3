"""Real training runs of a few steps: what they leave, what they resume to, what no longer runs after τ."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from haste.alignment.aligner import Aligner
from haste.errors import UserError
from haste.models import SiT
from haste.teachers import VisionTeacher
from haste.training import trainer as trainer_module
from haste.training.checkpoint import checkpoint_path, read_checkpoint, read_newest_checkpoint
from haste.training.feed import Feed
from haste.training.launch import make_accelerator
from haste.training.run_folder import RunFolder
from haste.training.trainer import Trainer, load_dataset, train

import haste_ext


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(a, b, where="checkpoint"):
    """Equal in every tensor and value, however deep."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}.{index}")
    else:
        assert a == b, where


def final_state(result):
    """The last checkpoint, without the settings that may change from one start to the next."""
    checkpoint = read_checkpoint(checkpoint_path(result.folder / "checkpoints", result.step))
    del checkpoint["args"]
    return checkpoint


@pytest.fixture
def calls(monkeypatch):
    """Counts what alignment would run: the operations, the teachers, the projectors, requests for q and k."""
    counts = dict.fromkeys(("attn_align_loss", "token_cosine_loss", "teacher", "projector", "queries_keys", "load"), 0)

    def count(name, original):
        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return counted

    for name in ("attn_align_loss", "token_cosine_loss"):
        monkeypatch.setattr(haste_ext, name, count(name, getattr(haste_ext, name)))
    monkeypatch.setattr(VisionTeacher, "forward", count("teacher", VisionTeacher.forward))
    monkeypatch.setattr(VisionTeacher, "from_pretrained", count("load", VisionTeacher.from_pretrained))
    original_forward = SiT.forward

    def forward(self, x, t, y, aligned_layers=(), project=False):
        output = original_forward(self, x, t, y, aligned_layers, project)
        counts["queries_keys"] += len(output.queries_keys)
        counts["projector"] += len(output.projections)
        return output

    monkeypatch.setattr(SiT, "forward", forward)
    return counts


def test_a_haste_run_leaves_its_log_and_its_checkpoints(make_config):
    result = train(make_config())
    assert result.step == 12 and result.interrupted is None
    log = read_log(result.folder)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert [line["aligned"] for line in log] == [True] * 6 + [False] * 6
    for line in log[:6]:
        expected = line["velocity_loss"] + 0.5 * line["feature_loss"] + 0.5 * line["attention_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0
    for line in log[6:]:
        assert line["feature_loss"] is None and line["attention_loss"] is None
        assert line["loss"] == line["velocity_loss"]
    names = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert names == ["0000004.pt", "0000008.pt", "0000012.pt"]
    checkpoint = read_checkpoint(result.folder / "checkpoints" / "0000008.pt")
    assert checkpoint["termination"]["stopped_at"] == 6


def test_log_lines_are_means_that_never_mix_aligned_and_free_steps(make_config):
    fine = read_log(train(make_config(exp_name="fine")).folder)
    coarse = read_log(train(make_config(exp_name="coarse", logging_steps=5, checkpointing_steps=100)).folder)
    assert [(line["step"], line["aligned"]) for line in coarse] == [(5, True), (6, True), (10, False), (12, False)]
    mean = sum(line["loss"] for line in fine[:5]) / 5
    assert coarse[0]["loss"] == pytest.approx(mean, rel=1e-6)


def test_the_student_learns(make_config):
    config = make_config(exp_name="learn", max_train_steps=150, early_stop_point=100, batch_size=16, logging_steps=25)
    log = read_log(train(config).folder)
    aligned = [line for line in log if line["aligned"]]
    assert log[-1]["velocity_loss"] < 0.7 * log[0]["velocity_loss"]
    assert aligned[-1]["feature_loss"] < aligned[0]["feature_loss"] - 0.2
    assert aligned[-1]["attention_loss"] < aligned[0]["attention_loss"]


# ---- the end of alignment ----


def test_after_tau_neither_teacher_nor_projector_nor_alignment_runs(make_config, calls):
    train(make_config())
    # 6 aligned steps, 2 layer pairs, 1 teacher; 6 more steps that add nothing
    assert calls == {
        "attn_align_loss": 12, "token_cosine_loss": 6, "teacher": 6, "projector": 6, "queries_keys": 12, "load": 1
    }  # fmt: skip


def test_after_tau_teacher_and_projector_are_no_longer_in_memory(make_config):
    config = make_config()
    trainer = Trainer(config, load_dataset("digits", 8), RunFolder(config), make_accelerator(config))
    teacher = [weakref.ref(p) for p in trainer.aligner.parameters()]
    student = trainer.student
    projectors = [weakref.ref(p) for m in (student.model, student.ema.model) for p in m.projectors.parameters()]
    assert teacher and projectors
    del student
    trainer.run()
    gc.collect()
    assert trainer.aligner is None
    assert [r for r in teacher + projectors if r() is not None] == []
    student = trainer.student
    kept = {id(p) for p in student.model.parameters()}
    assert {id(p) for group in student.optimizer.param_groups for p in group["params"]} == kept
    assert {id(p) for p in student.optimizer.state} <= kept


def test_checkpoints_after_tau_keep_the_projectors_as_they_were_for_the_public_trainers(make_config):
    folder = train(make_config(checkpointing_steps=6)).folder / "checkpoints"
    before, after = (read_checkpoint(checkpoint_path(folder, step)) for step in (6, 12))
    for part in ("model", "ema"):
        assert list(before[part]) == list(after[part])
        for name in before[part]:
            if name != "pos_embed":
                assert torch.equal(before[part][name], after[part][name]) == name.startswith("projectors."), name
    first_moment = after["opt"]["state"][list(after["model"]).index("final_layer.linear.weight")]["exp_avg"].clone()
    theirs = SiT(**after["model_config"], z_dims=(16,))
    theirs.load_state_dict(after["model"], strict=True)
    optimizer = torch.optim.AdamW(theirs.parameters())
    optimizer.load_state_dict(after["opt"])
    for parameter in theirs.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = optimizer.state[theirs.final_layer.linear.weight]
    assert state["step"] == 13
    torch.testing.assert_close(state["exp_avg"], 0.9 * first_moment + 0.1)


def test_a_run_resumed_after_tau_loads_no_teacher(make_config, calls):
    train(make_config(max_train_steps=8))
    assert calls["load"] == 1
    train(make_config())
    assert calls["load"] == 1 and calls["teacher"] == calls["projector"] == 6


@pytest.mark.parametrize(
    ("rule", "probes", "stopped_at"),
    [
        ({"termination": "cosine-ramp", "ramp_start": 2}, 0, 6),
        ({"termination": "gradient-cosine", "probe_threshold": 1.0}, 1, 4),  # every cosine is below 1
        ({"termination": "gradient-cosine", "probe_threshold": -1.0}, 1, 6),  # and none below -1
        ({"termination": "plateau", "plateau_min_delta": 100.0}, 3, 8),  # after the first, no loss is lower by 100
    ],
)
def test_a_rule_ends_alignment_for_good_and_a_resumed_run_follows_it(make_config, rule, probes, stopped_at, caplog):
    settings = {"probe_start": 4, "probe_every": 2, "probe_images": 10, "plateau_patience": 2, **rule}
    settings["early_stop_point"] = 9 if rule["termination"] == "plateau" else 6
    with caplog.at_level(logging.INFO):
        result = train(make_config(exp_name="unbroken", **settings))
    assert caplog.text.count("the probe gives") == probes
    assert f"step {stopped_at}: alignment ends (" in caplog.text
    assert [line["aligned"] for line in read_log(result.folder)] == [step < stopped_at for step in range(12)]
    train(make_config(max_train_steps=5, **settings))
    assert_same_bits(final_state(train(make_config(**settings))), final_state(result))


def test_the_ramp_weighs_both_alignment_losses(make_config):
    log = read_log(train(make_config(termination="cosine-ramp", early_stop_point=4, max_train_steps=4)).folder)
    for line, weight in zip(log, [1.0, 0.8536, 0.5, 0.1464], strict=True):
        alignment = 0.5 * line["feature_loss"] + 0.5 * line["attention_loss"]
        assert line["loss"] == pytest.approx(line["velocity_loss"] + weight * alignment, abs=1e-3)


def test_never_stopping_aligns_to_the_end(make_config, calls):
    train(make_config(early_stop_point=-1))
    assert calls["teacher"] == calls["token_cosine_loss"] == 12 and calls["attn_align_loss"] == 24


def test_repa_builds_no_attention_alignment(make_config, calls):
    log = read_log(train(make_config(attn_coeff=0.0, layer_map="")).folder)
    assert calls["attn_align_loss"] == calls["queries_keys"] == 0
    assert calls["teacher"] == calls["projector"] == 6
    assert all(line["attention_loss"] is None for line in log) and log[0]["feature_loss"] is not None


def test_attention_alone_needs_no_projector(make_config, calls):
    log = read_log(train(make_config(proj_coeff=0.0)).folder)
    assert calls["projector"] == calls["token_cosine_loss"] == 0 and calls["attn_align_loss"] == 12
    assert log[0]["feature_loss"] is None and log[0]["attention_loss"] is not None


def test_plain_sit_never_sees_a_teacher(make_config, calls, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("plain SiT has no aligner")

    monkeypatch.setattr(Aligner, "__init__", fail)
    plain = train(make_config(proj_coeff=0.0, attn_coeff=0.0, enc_type="/does/not/exist"))
    assert set(calls.values()) == {0}
    checkpoint = read_checkpoint(checkpoint_path(plain.folder / "checkpoints", 12))
    assert not [name for name in checkpoint["model"] if name.startswith("projectors.")]


def test_runs_that_differ_in_alignment_alone_see_the_same_pictures_noise_and_times(make_config):
    haste = read_log(train(make_config(exp_name="haste")).folder)
    plain = read_log(train(make_config(exp_name="plain", proj_coeff=0.0, attn_coeff=0.0)).folder)
    # A student at initialisation predicts 0: its loss is that of the target alone.
    assert haste[0]["velocity_loss"] == plain[0]["velocity_loss"]
    assert haste[-1]["velocity_loss"] != plain[-1]["velocity_loss"]


def test_two_teachers_each_get_a_projector(make_config, teacher_folder):
    result = train(make_config(enc_type=f"{teacher_folder},{teacher_folder}", max_train_steps=2))
    names = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 2))["model"]
    assert {name.split(".")[1] for name in names if name.startswith("projectors.")} == {"0", "1"}


# ---- going on ----


@pytest.fixture
def unbroken(make_config):
    return final_state(train(make_config(exp_name="unbroken")))


@pytest.mark.parametrize("stop", [3, 6, 9])  # before τ, at τ, after τ
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(make_config, unbroken, stop):
    first = train(make_config(max_train_steps=stop))
    assert first.step == stop
    torch.manual_seed(999)
    result = train(make_config())
    assert_same_bits(final_state(result), unbroken)
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))


def test_going_on_from_an_earlier_step(make_config, unbroken):
    train(make_config())
    assert_same_bits(final_state(train(make_config(resume_step=4))), unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(make_config, unbroken, monkeypatch, number):
    original = Feed.next

    def interrupted(self, step, pass_number):
        if step == 4:
            os.kill(os.getpid(), number)
        return original(self, step, pass_number)

    monkeypatch.setattr(Feed, "next", interrupted)
    result = train(make_config(checkpointing_steps=100))
    assert result.interrupted == number and result.step == 5
    monkeypatch.setattr(Feed, "next", original)
    assert_same_bits(final_state(train(make_config(checkpointing_steps=100))), unbroken)


def test_a_newest_checkpoint_that_is_cut_short_costs_only_its_steps(make_config, unbroken, caplog):
    result = train(make_config())
    newest = checkpoint_path(result.folder / "checkpoints", 12)
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert_same_bits(final_state(train(make_config())), unbroken)
    assert "is no whole checkpoint" in caplog.text


def test_a_finished_run_is_not_trained_again(make_config):
    result = train(make_config())
    before = (result.folder / "log.jsonl").read_text()
    assert train(make_config()).step == 12
    assert (result.folder / "log.jsonl").read_text() == before


def test_a_checkpoint_of_another_run_is_refused(make_config):
    other = train(make_config(exp_name="other", seed=1, max_train_steps=4))
    folder = RunFolder(make_config())
    folder.claim(0)
    (other.folder / "checkpoints" / "0000004.pt").rename(folder.checkpoints / "0000004.pt")
    with pytest.raises(UserError, match=r"holds a checkpoint with other settings: --seed \(1, now 0\)"):
        train(make_config())


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(make_config):
    path = checkpoint_path(train(make_config(max_train_steps=4)).folder / "checkpoints", 4)
    checkpoint = read_checkpoint(path)
    checkpoint["model"]["pos_embed"] = torch.zeros(1, 9, 16)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="does not fit SiT-Tiny/2"):
        train(make_config())


# ---- checkpoints of other trainers ----


def as_repa_writes(path, **settings):
    """Takes out of a checkpoint what REPA's trainer does not know."""
    checkpoint = read_checkpoint(path)
    args = argparse.Namespace(seed=0, encoder_depth=2, report_to="wandb", sampling_steps=10_000, **settings)
    public = {name: checkpoint[name] for name in ("model", "ema", "opt", "steps")}
    torch.save({**public, "args": args}, path)
    return public


@pytest.mark.parametrize("step", [4, 8])  # aligned, and after τ
def test_going_on_from_a_public_checkpoint(make_config, step):
    path = checkpoint_path(train(make_config(max_train_steps=step)).folder / "checkpoints", step)
    public = as_repa_writes(path, max_train_steps=400_000)
    (path.parent.parent / "args.json").write_text('{"seed": 0, "report_to": "wandb"}')
    config = make_config()
    checkpoint = read_newest_checkpoint(path.parent)
    trainer = Trainer(config, load_dataset("digits", 8), RunFolder(config), make_accelerator(config), checkpoint)
    assert trainer.step == step and (trainer.aligner is None) == (step == 8)
    loaded = trainer.student.state_dict()
    for part in ("model", "ema"):
        assert_same_bits(loaded[part], dict(public[part]))
    assert_same_bits(loaded["opt"]["state"], public["opt"]["state"])
    result = trainer.run()
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))


def test_a_new_run_may_begin_with_the_weights_of_another(make_config):
    other = train(make_config(exp_name="other", ema_decay=0.5))
    path = checkpoint_path(other.folder / "checkpoints", 12)
    config = make_config(init_from=str(path), seed=3)
    trainer = Trainer(config, load_dataset("digits", 8), RunFolder(config), make_accelerator(config))
    assert trainer.step == 0
    begun, given = trainer.student.state_dict(), read_checkpoint(path)
    for part in ("model", "ema"):
        for name, value in given[part].items():
            assert torch.equal(begun[part][name], value) != name.startswith("projectors."), name
    assert begun["opt"]["state"] == {}


def test_weights_of_another_size_are_refused(make_config):
    path = checkpoint_path(train(make_config(exp_name="other", max_train_steps=1)).folder / "checkpoints", 1)
    with pytest.raises(UserError, match="the checkpoint does not fit SiT-Digits/2: .*Missing key"):
        train(make_config(init_from=str(path), model="SiT-Digits/2"))


# ---- what goes wrong ----


@pytest.fixture
def nan_at_step_seven(monkeypatch):
    original, seen = trainer_module.velocity_loss, []

    def breaks(*args):
        seen.append(1)
        return original(*args) * (float("nan") if len(seen) == 7 else 1.0)

    monkeypatch.setattr(trainer_module, "velocity_loss", breaks)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_spares_the_checkpoint(make_config, nan_at_step_seven):
    config = make_config(logging_steps=100)
    with pytest.raises(UserError, match="not finite at step 7 "):
        train(config)
    folder = RunFolder(config).checkpoints
    assert [path.name for path in folder.iterdir()] == ["0000004.pt"]
    weights = read_checkpoint(folder / "0000004.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_step_that_is_not_finite_may_be_left_out(make_config, nan_at_step_seven, caplog):
    config = make_config(on_nan="skip", logging_steps=4, checkpointing_steps=1)
    with caplog.at_level(logging.WARNING):
        result = train(config)
    assert result.step == 12 and "not finite at step 7 " in caplog.text and "left out step 7" in caplog.text
    before, skipped, after = (
        read_checkpoint(checkpoint_path(result.folder / "checkpoints", step)) for step in (6, 7, 8)
    )
    for name, weight in before["model"].items():
        assert torch.equal(weight, skipped["model"][name])
    assert before["opt"]["state"][1]["step"] == skipped["opt"]["state"][1]["step"] == 6
    assert after["opt"]["state"][1]["step"] == 7
    log = read_log(result.folder)
    assert sum(line["skipped_steps"] for line in log) == 1
    assert all(line["loss"] is None or line["loss"] < 10 for line in log)


def test_when_no_step_is_finite_skipping_ends(make_config, monkeypatch):
    original = trainer_module.velocity_loss
    monkeypatch.setattr(trainer_module, "velocity_loss", lambda *args: original(*args) * float("inf"))
    with pytest.raises(UserError, match="not finite at step 1 .* nor at any of the 4 steps"):
        train(make_config(on_nan="skip", logging_steps=4))


def test_only_the_newest_checkpoints_are_kept(make_config):
    folder = train(make_config(checkpointing_steps=2, keep=2)).folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["0000010.pt", "0000012.pt"]


def test_a_full_disk_is_reported_before_the_first_step(make_config, monkeypatch):
    monkeypatch.setattr("haste.training.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"cannot be used: .*checkpoints has 0.0 GiB free, and a checkpoint takes"):
        train(make_config())


def test_a_disk_that_is_full_for_a_while_costs_no_steps_and_no_older_checkpoint(make_config, monkeypatch, caplog):
    free = iter([10**12, 10**12, 0, 10**12, 10**12, 10**12])
    monkeypatch.setattr("haste.training.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with caplog.at_level(logging.ERROR):
        folder = train(make_config(logging_steps=2, keep=1, checkpointing_steps=3, max_train_steps=8)).folder
    assert "0000006.pt could not be written, and training goes on: " in caplog.text
    # 3 written; 6 failed, and 3 was not deleted; 8, the next line of the log, is also the last step
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000008.pt"]


def test_a_disk_that_stays_full_spares_what_is_there(make_config, monkeypatch):
    free = iter([10**12, 10**12, 0, 0])
    monkeypatch.setattr("haste.training.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    config = make_config(keep=1, max_train_steps=12, checkpointing_steps=4, logging_steps=100)
    with pytest.raises(UserError, match=r"0000012.pt could not be written: .*checkpoints has 0.0 GiB free"):
        train(config)
    assert [path.name for path in RunFolder(config).checkpoints.iterdir()] == ["0000004.pt"]


def test_other_data_than_the_run_began_with_is_refused(make_config):
    path = checkpoint_path(train(make_config(max_train_steps=4)).folder / "checkpoints", 4)
    checkpoint = read_checkpoint(path)
    torch.save({**checkpoint, "data": {"images": 5}}, path)
    with pytest.raises(UserError, match="--data-dir digits has 1797 pictures; the run began with 5"):
        train(make_config())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "SiT-Huge/2"}, "--model is 'SiT-Huge/2'; it must be one of"),
        ({"data_dir": "cats"}, "--data-dir is 'cats'"),
        ({"resolution": 16}, "--resolution is 16; it must be 8"),
        ({"encoder_depth": 4}, "--encoder-depth is 4; it must be 1 to 3"),
        ({"layer_map": "0:1,3:2"}, "asks for layer 3 of the student, which has 3 layers"),
        ({"layer_map": "0:1,1:3"}, "asks for layer 3 of the teacher .* which has 3 layers"),
        ({"enc_type": "/no/such/teacher"}, "the teacher '/no/such/teacher' does not exist"),
        ({"teacher_resolution": 6}, "has 3 x 3 tokens and the student has 4 x 4; --teacher-resolution 8 would fit"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(make_config, change, sentence):
    config = make_config(**change)
    with pytest.raises(UserError, match=sentence):
        train(config)
    assert not RunFolder(make_config()).path.exists()  # and the name is free for the mended command


def test_a_process_that_has_used_one_precision_is_told_when_another_cannot_be_had(make_config):
    train(make_config(max_train_steps=1))
    with pytest.raises(UserError, match="--mixed-precision is bf16, which does not work here"):
        train(make_config(exp_name="other", mixed_precision="bf16"))


def test_a_batch_that_cannot_be_shared_out_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(UserError, match="--batch-size is 4; it must be a multiple of the 3 processes"):
        train(make_config())


def test_only_the_second_version_of_fsdp_is_taken(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP version 1 was launched; it must be 2: accelerate launch"):
        train(make_config())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="--termination is gradient-cosine, which needs whole weights; with FSDP"):
        train(make_config(termination="gradient-cosine"))


def test_accumulated_passes_equal_one_large_pass(make_config):
    large = train(make_config(exp_name="large", batch_size=8))
    small = train(make_config(exp_name="small", batch_size=2, gradient_accumulation_steps=4))
    for a, b in zip(read_log(large.folder), read_log(small.folder), strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    a, b = (final_state(result)["ema"] for result in (large, small))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_training_ends_after_the_last_epoch(make_config):
    # 1797 digits in steps of 800: two epochs are 4 whole steps
    result = train(make_config(batch_size=400, gradient_accumulation_steps=2, epochs=2))
    assert result.step == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_fp32_weights(make_config, precision):
    result = train(make_config(mixed_precision=precision, max_train_steps=4))
    assert all(line["loss"] < 10 for line in read_log(result.folder))
    model = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 4))["model"]
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}


def test_warmup_raises_the_learning_rate_linearly(make_config):
    config = make_config(warmup_steps=4, learning_rate=0.1)
    trainer = Trainer(config, load_dataset("digits", 8), RunFolder(config), make_accelerator(config))
    rates = []
    for trainer.step in range(6):
        rates.append(trainer._learning_rate())
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_the_plateau_rule_probes_ends_alignment_and_survives_a_resume(make_config, unbroken):
    rule = {"termination": "plateau", "probe_start": 2, "probe_every": 2, "probe_images": 4, "plateau_patience": 1,
            "plateau_min_delta": 10.0, "early_stop_point": -1}  # fmt: skip
    log = read_log(train(make_config(exp_name="whole", **rule)).folder)
    assert [line["aligned"] for line in log] == [True] * 4 + [False] * 8  # the second probe is at step 4
    train(make_config(exp_name="broken", max_train_steps=3, **rule))
    resumed = train(make_config(exp_name="broken", **rule))
    for a, b in zip(read_log(resumed.folder), log, strict=True):
        assert (a["loss"], a["aligned"]) == (b["loss"], b["aligned"])
    # A probe draws nothing of the run's: until it ends alignment, the run is the one without it.
    assert torch.equal(final_state(resumed)["rng"]["torch"], unbroken["rng"]["torch"])
