from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.resume import differing_settings, resolve
from transformers import Dinov2Config

REPA = TrainConfig(exp_name="a")
HASTE = replace(REPA, attn_coeff=0.5, early_stop_point=250_000)


def differences(old, new, **settings):
    """Between two runs that both have `settings` beside their own."""
    return differing_settings(asdict(replace(old, **settings)), replace(new, **settings))


def test_only_what_changes_the_computation_makes_another_run():
    moved = replace(REPA, max_train_steps=7, logging_steps=3, output_dir="there", data_dir="elsewhere")
    assert differing_settings(asdict(REPA), moved) == []
    assert differing_settings(asdict(REPA), replace(REPA, seed=1, batch_size=8)) == [
        "--batch-size (256, now 8)",
        "--seed (0, now 1)",
    ]


def test_what_another_trainer_had_no_setting_for_is_not_compared():
    assert differing_settings({"seed": 0, "use_wandb": True}, replace(REPA, attn_coeff=0.7)) == []


def test_settings_of_another_type_are_refused():
    with pytest.raises(UserError, match="seed of the settings of the run must be an integer, and is 'none'"):
        differing_settings({"seed": "none"}, REPA)


@pytest.mark.parametrize(
    ("old", "new", "settings"),
    [
        (REPA, replace(REPA, num_classes=1000), {}),
        (replace(REPA, num_classes=1000), REPA, {}),
        (REPA, replace(REPA, encoder_depth=8), {}),
        (HASTE, replace(HASTE, encoder_depth=5), {"model": "SiT-B/2"}),
        (HASTE, replace(HASTE, layer_map="4:8, 5:9,6:10,7:11"), {}),
        (REPA, replace(REPA, layer_map="1:1"), {}),  # attention is not aligned
        (replace(HASTE, proj_coeff=0.0), replace(HASTE, proj_coeff=0.0, encoder_depth=3, projector_dim=7), {}),
        (replace(REPA, enc_type="None"), replace(REPA, proj_coeff=0.0), {}),
        (replace(REPA, enc_type="None"), replace(REPA, enc_type="None", attn_coeff=1.0, encoder_depth=99), {}),
        (REPA, replace(REPA, enc_type="facebook/dinov2-base"), {}),
        (REPA, replace(REPA, probe_start=1, probe_threshold=0.5, plateau_patience=9, ramp_start=7), {}),
        (REPA, replace(REPA, probe_threshold=0.5), {"termination": "plateau"}),
        (REPA, replace(REPA, probe_block=8), {"termination": "gradient-cosine"}),
        (REPA, replace(REPA, teacher_resolution=224), {}),
        (REPA, replace(REPA, teacher_resolution=518), {"teacher_grid": "interpolate"}),
        (HASTE, replace(HASTE, enc_type="dinov2-vit-b,clip-vit-L"), {"proj_coeff": 0.0}),
        (replace(REPA, cfg_prob=0.19), replace(REPA, cfg_prob=0.1, legacy=True), {}),
    ],
)
def test_what_comes_to_the_same_is_the_same_run(old, new, settings):
    assert differences(old, new, **settings) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (REPA, HASTE, ["--attn-coeff (0.0, now 0.5)", "--early-stop-point (-1, now 250000)"]),
        (replace(REPA, enc_type="None"), REPA, ["--enc-type (None, now dinov2-vit-b)"]),
        (REPA, replace(REPA, encoder_depth=4), ["--encoder-depth (8, now 4)"]),
        (HASTE, replace(HASTE, layer_map="4:8"), ["--layer-map (4:8,5:9,6:10,7:11, now 4:8)"]),
        (REPA, replace(REPA, enc_type="dinov1-vit-b"), ["--enc-type (dinov2-vit-b, now dinov1-vit-b)"]),
        (REPA, replace(REPA, termination="plateau", probe_every=3), ["--termination (fixed, now plateau)"]),
        (replace(REPA, num_classes=10), replace(REPA, num_classes=1000), ["--num-classes (10, now 1000)"]),
        (REPA, replace(REPA, legacy=True), ["--legacy (False, now True)"]),
    ],
)
def test_what_does_not_is_another_and_only_the_cause_is_told(old, new, said):
    assert differences(old, new) == said


def test_a_teachers_folder_is_the_teacher_of_its_name(tmp_path, caplog):
    for name, width in (("base", 768), ("other", 384)):
        config = Dinov2Config(hidden_size=width, num_attention_heads=12, image_size=518, patch_size=14)
        config.save_pretrained(tmp_path / name)
        with open(tmp_path / name / "model.safetensors", "wb") as weights:  # which nobody reads
            weights.truncate(2**28)
    assert differing_settings(asdict(REPA), replace(REPA, enc_type=str(tmp_path / "base"))) == []
    assert differing_settings(asdict(REPA), replace(REPA, enc_type=str(tmp_path / "other"))) != []
    assert caplog.text == ""
    gone = replace(REPA, enc_type=str(tmp_path / "gone"))
    assert differing_settings(asdict(gone), REPA) == []
    assert "which is not here to compare it with" in caplog.text


def test_a_public_run_dropped_one_label_in_ten_whatever_its_cfg_prob_said():
    assert differing_settings({"cfg_prob": 0.0, "legacy": False}, REPA) == []
    assert differing_settings({"cfg_prob": 0.1, "legacy": True}, replace(REPA, legacy=True)) == []
    assert differing_settings({"cfg_prob": 0.0}, replace(REPA, cfg_prob=0.0)) == ["--cfg-prob (0.1, now 0.0)"]


@pytest.mark.parametrize(
    ("model", "attn_coeff", "depth"),
    [("SiT-B/2", 0.5, 5), ("SiT-S/2", 0.5, 5), ("SiT-XL/2", 0.5, 8), ("SiT-B/2", 0.0, 8), ("SiT-Digits/2", 0.0, 6)],
)
def test_the_depth_of_features_is_hastes_for_the_model_or_repas(model, attn_coeff, depth):
    config = replace(REPA, model=model, attn_coeff=attn_coeff, layer_map="0:0")
    assert resolve(config).encoder_depth == depth
    assert resolve(replace(config, encoder_depth=3)).encoder_depth == 3


def test_a_run_records_what_was_left_open():
    resolved = resolve(HASTE, num_classes=1000)
    assert (resolved.num_classes, resolved.encoder_depth, resolved.layer_map) == (1000, 8, "4:8,5:9,6:10,7:11")
    assert resolve(replace(HASTE, num_classes=10), num_classes=1000).num_classes == 10
