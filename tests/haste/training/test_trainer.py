"""Real training runs of a few steps: what they leave, what they resume to, what no longer runs after τ."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import weakref

import pytest
import torch
from accelerate import Accelerator
from haste.alignment.aligner import Aligner
from haste.errors import UserError
from haste.models import SiT
from haste.teachers import VisionTeacher
from haste.training import trainer as trainer_module
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.run_folder import RunFolder
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train

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
    projectors = [weakref.ref(p) for m in (trainer.model, trainer.ema.model) for p in m.projectors.parameters()]
    assert teacher and projectors
    trainer.run()
    gc.collect()
    assert trainer.aligner is None
    assert [r for r in teacher + projectors if r() is not None] == []
    kept = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == kept
    assert {id(p) for p in trainer.optimizer.state} <= kept
    checkpoint = read_checkpoint(checkpoint_path(trainer.folder.checkpoints, 12))
    assert not [name for part in ("model", "ema") for name in checkpoint[part] if name.startswith("projectors.")]


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
    original = Trainer._next_batch

    def interrupted(self):
        if self.step == 4:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, "_next_batch", interrupted)
    result = train(make_config(checkpointing_steps=100))
    assert result.interrupted == number and result.step == 5
    monkeypatch.setattr(Trainer, "_next_batch", original)
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
    folder.claim()
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


# ---- what goes wrong ----


def test_a_loss_that_is_not_finite_stops_with_its_step_and_spares_the_checkpoint(make_config, monkeypatch):
    original, seen = trainer_module.velocity_loss, []

    def breaks_at_step_seven(*args):
        seen.append(1)
        return original(*args) * (float("nan") if len(seen) == 7 else 1.0)

    monkeypatch.setattr(trainer_module, "velocity_loss", breaks_at_step_seven)
    config = make_config(logging_steps=100)
    with pytest.raises(UserError, match="not finite at step 7 "):
        train(config)
    folder = RunFolder(config).checkpoints
    assert [path.name for path in folder.iterdir()] == ["0000004.pt"]
    weights = read_checkpoint(folder / "0000004.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


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


def test_several_processes_are_refused_instead_of_training_twice(make_config, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(UserError, match="2 processes were launched; haste train runs in one process so far"):
        train(make_config())


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
        trainer._set_learning_rate()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
