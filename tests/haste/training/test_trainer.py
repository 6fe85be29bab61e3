"""Real training runs of a few steps: what they leave, what no longer runs after τ, what is refused."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from haste.alignment.aligner import Aligner
from haste.errors import UserError
from haste.generation.loaded import load_checkpoint
from haste.models import SiT
from haste.teachers import VisionTeacher
from haste.training.checkpoint import checkpoint_path, loaded_model, read_checkpoint
from haste.training.run_dir import RunDir
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from haste.transport import shift_time
from PIL import Image
from training_runs import assert_same_bits, final_state, read_log

import haste_ext


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
        expected = line["loss"] + 0.5 * line["proj_loss"] + 0.5 * line["attn_loss"]
        assert line["total_loss"] == pytest.approx(expected, rel=1e-5)
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0
    for line in log[6:]:
        assert line["proj_loss"] is None and line["attn_loss"] is None
        assert line["total_loss"] == line["loss"]
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
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert aligned[-1]["proj_loss"] < aligned[0]["proj_loss"] - 0.2
    assert aligned[-1]["attn_loss"] < aligned[0]["attn_loss"]


# ---- the end of alignment ----


def test_after_tau_neither_teacher_nor_projector_nor_alignment_runs(make_config, calls):
    train(make_config())
    # 6 aligned steps, 2 layer pairs, 1 teacher; 6 more steps that add nothing
    assert calls == {
        "attn_align_loss": 12, "token_cosine_loss": 6, "teacher": 6, "projector": 6, "queries_keys": 12, "load": 1
    }  # fmt: skip


def test_after_tau_teacher_and_projector_are_no_longer_in_memory(make_config):
    config = make_config()
    trainer = Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config))
    teacher = [weakref.ref(p) for p in trainer.aligner.parameters()]
    student = trainer.state
    projectors = [weakref.ref(p) for m in (student.model, student.ema.model) for p in m.projectors.parameters()]
    assert teacher and projectors
    del student
    trainer.run()
    gc.collect()
    assert trainer.aligner is None
    assert [r for r in teacher + projectors if r() is not None] == []
    student = trainer.state
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
        alignment = 0.5 * line["proj_loss"] + 0.5 * line["attn_loss"]
        assert line["total_loss"] == pytest.approx(line["loss"] + weight * alignment, abs=1e-3)


def test_never_stopping_aligns_to_the_end(make_config, calls):
    train(make_config(early_stop_point=-1))
    assert calls["teacher"] == calls["token_cosine_loss"] == 12 and calls["attn_align_loss"] == 24


def test_repa_builds_no_attention_alignment(make_config, calls):
    log = read_log(train(make_config(attn_coeff=0.0, layer_map="")).folder)
    assert calls["attn_align_loss"] == calls["queries_keys"] == 0
    assert calls["teacher"] == calls["projector"] == 6
    assert all(line["attn_loss"] is None for line in log) and log[0]["proj_loss"] is not None


def test_attention_alone_needs_no_projector(make_config, calls):
    log = read_log(train(make_config(proj_coeff=0.0)).folder)
    assert calls["projector"] == calls["token_cosine_loss"] == 0 and calls["attn_align_loss"] == 12
    assert log[0]["proj_loss"] is None and log[0]["attn_loss"] is not None


def test_plain_sit_never_sees_a_teacher(make_config, calls, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("plain SiT has no aligner")

    monkeypatch.setattr(Aligner, "__init__", fail)
    plain = train(make_config(proj_coeff=0.0, attn_coeff=0.0, enc_type="/does/not/exist"))
    assert set(calls.values()) == {0}
    checkpoint = read_checkpoint(checkpoint_path(plain.folder / "checkpoints", 12))
    assert not [name for name in checkpoint["model"] if name.startswith("projectors.")]


def test_runs_that_differ_in_alignment_alone_see_the_same_images_noise_and_times(make_config):
    haste = read_log(train(make_config(exp_name="haste")).folder)
    plain = read_log(train(make_config(exp_name="plain", proj_coeff=0.0, attn_coeff=0.0)).folder)
    # A student at initialisation predicts 0: its loss is that of the target alone.
    assert haste[0]["loss"] == plain[0]["loss"]
    assert haste[-1]["loss"] != plain[-1]["loss"]


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_times_are_shifted_and_noise_is_not(make_config, monkeypatch, path):
    seen = {}
    original = Trainer._random_numbers
    for name, shift in (("even", 1.0), ("shifted", 3.0)):

        def recorded(self, name=name):
            seen[name] = original(self)
            return seen[name]

        monkeypatch.setattr(Trainer, "_random_numbers", recorded)
        result = train(make_config(exp_name=name, time_shift=shift, path_type=path, max_train_steps=1))
    torch.testing.assert_close(seen["shifted"].t, shift_time(seen["even"].t, 3.0, path), rtol=0, atol=0)
    assert torch.equal(seen["shifted"].noise, seen["even"].noise) and (seen["shifted"].t > seen["even"].t).all()
    assert load_checkpoint(result.folder).config.time_shift == 3.0  # which samplers use
    with pytest.raises(UserError, match="--time-shift 3.0, not 1.0"):
        train(make_config(exp_name="shifted", path_type=path, max_train_steps=2))


def test_two_teachers_each_get_a_projector(make_config, teacher_folder):
    result = train(make_config(enc_type=f"{teacher_folder},{teacher_folder}", max_train_steps=2))
    names = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 2))["model"]
    assert {name.split(".")[1] for name in names if name.startswith("projectors.")} == {"0", "1"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "SiT-Huge/2"}, "--model must be one of .* got 'SiT-Huge/2'"),
        ({"data_dir": "cats"}, "--data-dir must be .* got 'cats'"),
        ({"resolution": 16}, "--resolution must be 8"),
        ({"encoder_depth": 4}, "--encoder-depth must be 1 to 3, .* got 4"),
        ({"layer_map": "0:1,3:2"}, "--layer-map must name student layers from 0 to 2, got 3"),
        ({"layer_map": "0:1,1:3"}, "--layer-map must name layers from 0 to 2 of the teacher .* got 3"),
        ({"enc_type": "/no/such/teacher"}, "--enc-type must be a folder .* got '/no/such/teacher'"),
        ({"teacher_resolution": 6}, "--teacher-resolution must be 8, .* 4 x 4 tokens, got 6, at which it has 3 x 3"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(make_config, change, sentence):
    config = make_config(**change)
    with pytest.raises(UserError, match=sentence):
        train(config)
    assert not RunDir(make_config()).path.exists()  # and the name is free for the mended command


def test_a_process_that_has_used_one_precision_is_told_when_another_cannot_be_had(make_config):
    train(make_config(max_train_steps=1))
    with pytest.raises(UserError, match="--mixed-precision must work here, got bf16"):
        train(make_config(exp_name="other", mixed_precision="bf16"))


def test_a_batch_that_cannot_be_shared_out_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(UserError, match="--batch-size must be a multiple of 3, the number of processes, got 4"):
        train(make_config())


def test_only_the_second_version_of_fsdp_is_taken(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--fsdp_version of accelerate launch must be 2, got 1"):
        train(make_config())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="--termination must be another rule with FSDP"):
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


def test_a_model_of_its_own_size_is_resumed_and_loaded(make_config):
    config = make_config(model="SiT-B/1", depth=2, hidden_size=32, num_heads=4, layer_map="0:1,1:2", max_train_steps=4)
    folder = train(config).folder
    checkpoint = read_checkpoint(checkpoint_path(folder / "checkpoints", 4))
    size = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 1}
    assert size.items() <= checkpoint["model_config"].items()
    assert len(loaded_model(checkpoint).blocks) == 2
    assert train(replace(config, max_train_steps=5)).step == 5
    with pytest.raises(UserError, match=r"--depth 2, not 3"):
        train(replace(config, depth=3, max_train_steps=6))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"depth": 0}, "--depth must be an integer from 1"),
        ({"num_heads": 5}, "--hidden-size must be a multiple of --num-heads, 5, got 16"),
        ({"depth": 1}, "--encoder-depth must be 1 to 1"),
        ({"depth": 2, "layer_map": "0:1,2:2"}, "layer"),
        ({"patch_size": 3}, "input must be a multiple of --patch-size, 3, got 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(make_config, change, sentence):
    with pytest.raises(UserError, match=sentence):
        train(make_config(**change))


def test_images_that_the_teacher_cannot_be_given_are_refused_before_the_folder_is_made(make_config, tmp_path):
    for number in range(4):
        folder = tmp_path / "images" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    config = make_config(data_dir=str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"--enc-type must be a teacher of images with 3 channels, .* --data-dir .* 1"):
        train(config)
    assert not RunDir(config).path.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"epochs": 1, "max_train_steps": 1000},
            "training ends after step 449: --epochs 1 of 1,797 images in steps of 4",
        ),
        ({"max_train_steps": 2}, "training ends after step 2: --max-train-steps 2"),
    ],
)
def test_the_log_says_what_ends_training(make_config, caplog, monkeypatch, settings, sentence):
    caplog.set_level("INFO")
    monkeypatch.setattr(Trainer, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings))
    assert sentence in caplog.text


def interrupt(self):
    raise KeyboardInterrupt
