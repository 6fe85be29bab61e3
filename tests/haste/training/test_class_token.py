"""Runs that denoise the teacher's class token (REG): losses before and after τ, resumed, started from, refused."""

from __future__ import annotations

import pytest
import torch
from haste.alignment.aligner import Aligner
from haste.digits import load_digits
from haste.errors import UserError
from haste.teachers import VisionTeacher
from haste.training.checkpoint import read_checkpoint
from haste.training.config import TrainConfig
from haste.training.settings import differing_settings, known_settings
from haste.training.trainer import train
from small_models import save_teacher
from training_runs import assert_a_killed_run_is_the_unbroken_one, read_log
from transformers import SiglipVisionConfig, SiglipVisionModel


def test_the_class_token_is_learnt_to_the_end_and_alignment_until_tau(make_config):
    result = train(make_config(cls_coeff=0.03))
    log = read_log(result.folder)
    for line in log:
        alignment = 0.5 * line["proj_loss"] + 0.5 * line["attn_loss"] if line["aligned"] else 0.0
        expected = line["loss"] + 0.03 * line["cls_loss"] + alignment
        assert line["total_loss"] == pytest.approx(expected, rel=1e-5)
    assert [line["aligned"] for line in log] == [True] * 6 + [False] * 6
    checkpoint = read_checkpoint(result.folder / "checkpoints" / "0000012.pt")
    assert checkpoint["model_config"]["cls_token_dim"] == 16
    before = read_checkpoint(result.folder / "checkpoints" / "0000008.pt")
    for part in ("model", "ema"):
        for name in ("cls_projectors2.weight", "final_layer.linear_cls.weight"):
            assert not torch.equal(before[part][name], checkpoint[part][name])
    assert list((result.folder / "samples").glob("*.png"))

    # The image's noise, times and dropped labels are those of a run without; a new model predicts zero.
    vanilla = read_log(train(make_config(exp_name="haste", cls_coeff=0.0)).folder)
    assert vanilla[0]["loss"] == log[0]["loss"] and vanilla[0]["cls_loss"] is None
    assert vanilla[-1]["loss"] != log[-1]["loss"]


@pytest.mark.parametrize("stop", [3, 10])
def test_a_killed_run_is_the_unbroken_one(make_config, monkeypatch, stop):
    """Also after τ, where the teacher is loaded for its class token alone."""
    assert_a_killed_run_is_the_unbroken_one(lambda **changes: make_config(cls_coeff=0.03, **changes), monkeypatch, stop)


def test_the_teacher_needs_no_alignment(make_config, monkeypatch):
    asked = []
    forward = VisionTeacher.forward
    monkeypatch.setattr(VisionTeacher, "forward", lambda self, x: asked.append(forward(self, x)) or asked[-1])
    log = read_log(train(make_config(cls_coeff=0.5, proj_coeff=0.0, attn_coeff=0.0, max_train_steps=2)).folder)
    assert [line["aligned"] for line in log] == [False] * 2
    assert log[0]["total_loss"] == pytest.approx(log[0]["loss"] + 0.5 * log[0]["cls_loss"], rel=1e-6)
    assert all(out.patch_tokens is None and out.queries_keys == [] for out in asked) and len(asked) == 2


@pytest.mark.parametrize("rule", ["gradient-cosine", "plateau"])
def test_probes_see_the_class_token(make_config, rule):
    config = make_config(
        cls_coeff=0.03, termination=rule, probe_start=2, probe_every=2, probe_images=4, max_train_steps=5
    )
    assert read_log(train(config).folder)[-1]["cls_loss"] > 0


def test_features_are_compared_with_the_class_token_in_front(teacher_folder):
    aligner = Aligner.from_pretrained(str(teacher_folder), grid=4, proj_coeff=1.0, attn_coeff=0.0, class_token=True)
    outputs = aligner.teacher_outputs(load_digits()[0][:3])
    z = torch.randn(3, 17, 16)
    tokens = torch.cat([outputs[0].class_token[:, None], outputs[0].patch_tokens], dim=1).double()
    expected = -torch.cosine_similarity(z.double(), tokens, dim=-1).mean()
    assert aligner.losses([], [z], outputs).feature.item() == pytest.approx(expected.item(), rel=1e-5)
    left = aligner.without_losses().teacher_outputs(load_digits()[0][:3])
    assert torch.equal(left[0].class_token, outputs[0].class_token) and left[0].patch_tokens is None


def test_a_student_on_its_teachers_grid_has_its_class_token_as_it_is(teacher_folder):
    aligner = Aligner.from_pretrained(str(teacher_folder), grid=2, proj_coeff=1.0, attn_coeff=0.0, class_token=True,
                                      grid_rule="interpolate-student")  # fmt: skip
    outputs = aligner.teacher_outputs(load_digits()[0][:3])
    z = torch.zeros(3, 5, 16)
    z[:, 0] = outputs[0].class_token
    assert aligner.losses([], [z], outputs).feature.item() == pytest.approx(-1 / 17, rel=1e-5)


def test_runs_start_from_weights_with_and_without_a_class_token_alike(make_config, tmp_path):
    first = train(make_config(exp_name="first", cls_coeff=0.03, max_train_steps=1))
    second = train(make_config(exp_name="second", cls_coeff=0.1, max_train_steps=1, init_from=str(first.folder)))
    begun, went_on = (read_log(run.folder)[0] for run in (first, second))  # at the same images and noise
    assert went_on["loss"] < begun["loss"] and went_on["cls_loss"] < begun["cls_loss"]
    with pytest.raises(UserError, match="--cls-coeff must be above 0"):
        train(make_config(exp_name="third", init_from=str(first.folder)))
    vanilla = train(make_config(exp_name="vanilla", max_train_steps=1))
    with pytest.raises(UserError, match="--cls-coeff must be 0 for a model of --init-from without"):
        train(make_config(exp_name="third", cls_coeff=0.03, init_from=str(vanilla.folder)))
    wide = str(save_teacher(tmp_path / "wide", hidden_size=24))
    with pytest.raises(UserError, match="--enc-type must be a teacher with class tokens of width 16"):
        train(make_config(exp_name="third", cls_coeff=0.03, enc_type=wide, init_from=str(first.folder)))
    with pytest.raises(UserError, match="--cls-coeff 0.03, not 0.1"):
        train(make_config(exp_name="first", cls_coeff=0.1))


def test_runs_that_recorded_no_coefficient_had_none(make_config):
    config = make_config()
    older = {name: value for name, value in vars(config.to_namespace()).items() if name != "cls_coeff"}
    assert differing_settings(older, config) == []
    assert differing_settings(older, make_config(cls_coeff=0.03)) == ["--cls-coeff 0.0, not 0.03"]
    assert known_settings({"model": "SiT-B/2", "cls": 0.03}, "args")["cls_coeff"] == 0.03  # REG's name


def test_what_it_needs_is_asked_for_by_name(make_config, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    SiglipVisionModel(SiglipVisionConfig(**shape, num_channels=1, image_size=8, patch_size=2)).save_pretrained(tmp_path)
    refusals = {
        "--enc-type must be a teacher with --cls-coeff": {"enc_type": None},
        "--enc-type must be a teacher with a class token": {"enc_type": str(tmp_path)},
        "--projection-layer-type must be mlp": {"projection_layer_type": "conv"},
        "--cls-coeff must be left out for DiT": {"model": "DiT-Digits/2", "prediction": "noise"},
        "--cls-coeff must be left out for xAR": {"model": "xAR-Tiny/2"},
        "--cls-coeff must be a number from 0": {"cls_coeff": -1.0},
    }
    for sentence, changes in refusals.items():
        with pytest.raises(UserError, match=sentence):
            train(make_config(**{"cls_coeff": 0.03, **changes}))


def test_presets_are_repas_with_a_class_token():
    preset, repa = TrainConfig.from_preset("reg-xl-256"), TrainConfig.from_preset("repa-xl-256")
    assert (preset.cls_coeff, preset.proj_coeff, preset.encoder_depth) == (0.03, 0.5, 8)
    assert TrainConfig.from_preset("reg-b-256").encoder_depth == 4 and repa.cls_coeff is None
