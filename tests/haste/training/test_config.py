"""Settings, presets, and what the open ones come to."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import pytest
from haste.alignment import LayerMap, choose_layer_map
from haste.errors import UserError
from haste.models import model_depth
from haste.training.config import TrainConfig, describe_run, list_presets, resolve
from haste.training.presets import PRESETS
from haste.training.schedule import LearningRate
from haste.training.settings import differing_settings
from haste.validation import build


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exp_name": ""}, "--exp-name must be the name of the run"),
        ({"batch_size": 10**12}, "--batch-size must be an integer from 1 to 1,048,576, got 1000000000000"),
        ({"learning_rate": 0.0}, "--learning-rate must be a number above 0 and up to 1,000, got 0.0"),
        ({"cfg_prob": 1.0}, "--cfg-prob must be a number from 0 to below 1, got 1.0"),
        ({"report_to": "mlflow"}, "--report-to must be tensorboard, wandb, both .* got mlflow"),
    ],
)
def test_values_that_no_run_can_have_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(TrainConfig(exp_name="a"), **change).check()


def test_teachers_are_those_that_have_something_to_teach():
    assert TrainConfig(enc_type="a, b").teachers == ["a", "b"]
    assert TrainConfig(enc_type="a", proj_coeff=0.0, attn_coeff=0.5).teachers == ["a"]
    assert TrainConfig(enc_type="a", proj_coeff=0.0).teachers == []
    assert TrainConfig(enc_type="None").teachers == []  # as REPA's commands have it
    assert TrainConfig(enc_type="none").teachers == [] == TrainConfig(enc_type=None).teachers


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": "8"}, "batch_size must be an integer, .*'8'"),
        ({"learning_rate": None}, "learning_rate must be a number, .*None"),
        ({"compile": 1}, "compile must be true or false, .*1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of 'no', 'fp16', 'bf16', .*'fp8'"),
        ({"depth": 2.0}, "depth must be an integer or nothing, .*2.0"),
        ({"exp_name": 3}, "exp_name must be text, .*3"),
    ],
)
def test_values_of_another_type_are_refused_at_once(change, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        TrainConfig(**change)


def test_paths_and_whole_numbers_become_text_and_floats(tmp_path):
    config = TrainConfig(output_dir=tmp_path, vae=tmp_path, learning_rate=1)
    assert (config.output_dir, config.vae) == (str(tmp_path), str(tmp_path)) and type(config.learning_rate) is float


def test_the_namespace_of_a_checkpoint_gives_the_settings_back():
    config = TrainConfig(exp_name="a", seed=3, teacher_resolution=448)
    namespace = config.to_namespace()
    assert type(namespace) is argparse.Namespace
    assert build(TrainConfig, vars(namespace), "args") == config


def test_another_trainers_own_flags_are_left_out():
    assert build(TrainConfig, {"seed": 5, "vae_type": "ema"}, "args") == TrainConfig(seed=5)


@pytest.mark.parametrize(("enc_type", "aligned"), [("dinov2-vit-b", True), ("None", False)])
def test_without_a_teacher_no_coefficient_aligns_anything(enc_type, aligned):
    config = TrainConfig(enc_type=enc_type, attn_coeff=0.5, proj_coeff=0.5)
    assert (config.aligns_attention, config.aligns_features) == (aligned, aligned)


def test_nobody_saying_more_it_is_repa():
    config = TrainConfig()
    assert (config.attn_coeff, config.proj_coeff, config.early_stop_point) == (0.0, 0.5, -1)


def test_legacy_drops_labels_twice():
    assert TrainConfig(cfg_prob=0.1).label_dropout == 0.1
    assert TrainConfig(cfg_prob=0.1, legacy=True).label_dropout == pytest.approx(0.19)
    assert TrainConfig(cfg_prob=0.0, legacy=True).label_dropout == 0.0


@pytest.mark.parametrize("flag", ["exp_name", "logging_dir"])
@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", ".", "..", "a\nb", "a\0b", "\udc80", " a", "a ", "\x1b[31m", "a" * 201]
)
def test_what_is_no_plain_name_of_a_folder_is_refused(flag, name):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} must be a plain name of a folder") as caught:
        replace(TrainConfig(exp_name="a"), **{flag: name}).check()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["linear-dinov2-b-enc8", "$\\frac{$", "été 2", ".a", "a" * 200])
def test_any_plain_name_of_a_folder_will_do(name):
    TrainConfig(exp_name=name).check()


def test_no_preset_is_the_trainers_own_values():
    assert TrainConfig.from_preset("") == TrainConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_run(name):
    config = TrainConfig.from_preset(name)
    config.check()
    assert config.preset == name
    assert model_depth(config) > 0
    assert config.early_stop_point < config.max_train_steps
    assert f"{name}\n  --exp-name {name} " in list_presets()


def test_every_size_has_every_method_at_both_resolutions():
    sizes, methods = ("s", "b", "l", "xl"), ("haste", "repa", "baseline")
    wanted = {f"{method}-{size}-{side}" for method in methods for size in sizes for side in (256, 512)}
    wanted |= {
        f"{method}dit-{size}-{side}" for method in ("", "haste-", "repa-") for size in sizes for side in (256, 512)
    }
    xar = {f"{method}xar-{size}-256" for method in ("", "haste-", "repa-") for size in ("b", "l", "h")}
    coco = {f"{method}mmdit-coco" for method in ("", "haste-", "repa-")}
    assert wanted | xar | coco | {"digits", "xar-digits", "t2i-digits"} <= PRESETS.keys()


def test_the_settings_of_text_to_image():
    haste, repa, vanilla = (TrainConfig.from_preset(f"{method}mmdit-coco") for method in ("haste-", "repa-", ""))
    assert (haste.model, haste.batch_size, haste.learning_rate, haste.mixed_precision) == (
        "MM-DiT-COCO",
        256,
        1e-4,
        "fp16",
    )
    assert (haste.attn_coeff, haste.proj_coeff, haste.max_train_steps, haste.early_stop_point) == (
        0.5,
        0.5,
        250_000,
        200_000,
    )
    assert (repa.attn_coeff, repa.proj_coeff, repa.max_train_steps, repa.early_stop_point) == (0, 0.5, 150_000, -1)
    assert vanilla.teachers == [] and vanilla.max_train_steps == 150_000


def test_xars_settings():
    xar = TrainConfig.from_preset("xar-b-256")
    assert (xar.model, xar.teachers, xar.dropout, xar.weighting) == ("xAR-B", [], 0.1, "lognormal")
    assert (xar.batch_size, xar.epochs, xar.ema_decay, xar.max_grad_norm) == (2048, 800, 0.9999, 1.0)
    assert (xar.adam_beta1, xar.adam_beta2, xar.adam_weight_decay, xar.adam_decay) == (0.9, 0.96, 0.02, "matrices")
    schedule = LearningRate.of_run(xar, 800)  # an epoch in each step
    assert (schedule.rate, schedule.minimum, schedule.warmup, schedule.decay) == (4e-4, 1e-5, 100, 200)
    haste = TrainConfig.from_preset("haste-xar-b-256")
    assert (haste.layer_map, haste.encoder_depth, haste.early_stop_point) == ("2:7,3:9,4:11", 5, 12_500)
    for size in ("b", "l", "h"):
        for method in ("", "haste-", "repa-"):
            TrainConfig.from_preset(f"{method}xar-{size}-256").check_model()


def test_the_papers_settings():
    xl = TrainConfig.from_preset("haste-xl-512")
    assert (xl.model, xl.resolution, xl.encoder_depth, xl.early_stop_point) == ("SiT-XL/2", 512, 8, 300_000)
    assert LayerMap.parse(xl.layer_map) == choose_layer_map("", "SiT-XL/2")
    b = TrainConfig.from_preset("haste-b-256")
    assert LayerMap.parse(b.layer_map) == choose_layer_map("", "SiT-B/2")
    assert (b.encoder_depth, b.early_stop_point, b.attn_coeff, b.proj_coeff) == (5, 100_000, 0.5, 0.5)
    repa = TrainConfig.from_preset("repa-l-256")
    assert (repa.attn_coeff, repa.proj_coeff, repa.encoder_depth, repa.early_stop_point) == (0.0, 0.5, 8, -1)
    assert TrainConfig.from_preset("baseline-s-256").teachers == []


def test_dits_settings_are_those_of_the_sit_of_its_size():
    """HASTE (arXiv 2505.16792) trains DiT-XL with the layers, the coefficients and the τ of SiT-XL."""
    for name, like in (
        ("haste-dit-xl-256", "haste-xl-256"),
        ("repa-dit-b-256", "repa-b-256"),
        ("dit-s-512", "baseline-s-512"),
    ):
        dit, sit = TrainConfig.from_preset(name), TrainConfig.from_preset(like)
        assert (dit.model, dit.prediction) == (sit.model.replace("SiT", "DiT"), "noise")
        assert replace(dit, preset="", exp_name="", model="", prediction=None) == replace(
            sit, preset="", exp_name="", model=""
        )
        dit.check_model()
        assert resolve(replace(dit, layer_map="", encoder_depth=None)).layer_map == resolve(sit).layer_map


@pytest.mark.parametrize(("model", "given", "own"), [("DiT-S/2", "v", "noise"), ("SiT-S/2", "noise", "v")])
def test_a_model_has_one_prediction(model, given, own):
    assert resolve(TrainConfig(model=model)).prediction == own
    with pytest.raises(UserError, match=f"^--prediction must be {own} for --model {model}, got {given}$"):
        TrainConfig(model=model, prediction=given).check_model()


def test_a_run_is_described_by_what_it_has():
    preset = TrainConfig.from_preset("baseline-s-256")
    assert f"\n  {describe_run(preset)}\n" in list_presets() and "(preset" not in list_presets()
    text = describe_run(replace(preset, model="SiT-B/2", seed=7))
    assert "--model SiT-B/2 (preset: SiT-S/2)" in text and text.count("(preset") == 1


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="--preset must be digits, haste-xl-256 or another .* got digit"):
        TrainConfig.from_preset("digit")


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--model must be one of .*SiT-S/1, .*SiT-Digits/2.*, got 'SiT-M/2'"):
        model_depth(TrainConfig(model="SiT-M/2"))


@pytest.mark.parametrize("changes", [{}, {"proj_coeff": 0.0}])
def test_a_depth_of_ones_own_over_a_preset_is_told_what_belongs_to_it(changes):
    with pytest.raises(UserError, match="; --preset digits is for another depth: give --encoder-depth and --layer-map"):
        replace(TrainConfig.from_preset("digits"), depth=2, **changes).check_model()
    with pytest.raises(UserError, match="--encoder-depth must be 1 to 2, the depth of the model, got 3$"):
        replace(TrainConfig.from_preset("digits"), depth=2, encoder_depth=3).check_model()


@pytest.mark.parametrize("own", [{"entity": "cell"}, {"entity_size": 2}, {"context": "clean"}, {"dropout": 0.1}])
def test_settings_that_a_family_does_not_have_are_refused(own):
    config = replace(TrainConfig.from_preset("digits"), **own)
    ((name, value),) = own.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be left out for SiT, .* got {value}"):
        config.check_model()


def test_a_family_s_own_settings_are_recorded_with_its_defaults():
    config = TrainConfig(exp_name="a", model="xAR-B", enc_type=None)
    resolved = resolve(config)
    assert (resolved.entity, resolved.context, resolved.dropout) == ("cell", "random", 0.1)
    assert differing_settings(asdict(resolved), replace(config, context="random")) == []
    assert differing_settings(asdict(resolved), replace(config, dropout=0.0)) == ["--dropout 0.1, not 0.0"]
    with pytest.raises(UserError, match="--dropout must be a number from 0 to below 1, got 1.0"):
        replace(config, dropout=1.0).check()
    with pytest.raises(UserError, match="--entity-size must be an integer from 1"):
        replace(config, entity_size=0).check()
