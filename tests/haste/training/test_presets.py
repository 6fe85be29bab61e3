from dataclasses import replace

import pytest
from haste.alignment import LayerMap, choose_layer_map
from haste.errors import UserError
from haste.models import model_depth
from haste.training.config import PRESETS, TrainConfig, describe_preset, describe_run, preset_config


def test_no_preset_is_the_trainers_own_values():
    assert preset_config("") == TrainConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_run(name):
    config = preset_config(name)
    config.check()
    assert config.preset == name
    assert model_depth(config.model) > 0
    assert config.early_stop_point < config.max_train_steps
    assert describe_preset(name).startswith(f"--exp-name {name} ")


def test_every_size_has_every_method_at_both_resolutions():
    sizes, methods = ("s", "b", "l", "xl"), ("haste", "repa", "plain")
    wanted = {f"{method}-{size}-{side}" for method in methods for size in sizes for side in (256, 512)}
    assert wanted | {"digits"} == PRESETS.keys()


def test_the_papers_settings():
    xl = preset_config("haste-xl-512")
    assert (xl.model, xl.resolution, xl.encoder_depth, xl.early_stop_point) == ("SiT-XL/2", 512, 8, 300_000)
    assert LayerMap.parse(xl.layer_map) == choose_layer_map("", "SiT-XL/2")
    b = preset_config("haste-b-256")
    assert LayerMap.parse(b.layer_map) == choose_layer_map("", "SiT-B/2")
    assert (b.encoder_depth, b.early_stop_point, b.attn_coeff, b.proj_coeff) == (5, 100_000, 0.5, 0.5)
    repa = preset_config("repa-l-256")
    assert (repa.attn_coeff, repa.proj_coeff, repa.encoder_depth, repa.early_stop_point) == (0.0, 0.5, 8, -1)
    assert preset_config("plain-s-256").teachers == []


def test_a_run_is_described_by_what_it_has():
    preset = preset_config("plain-s-256")
    assert describe_run(preset) == describe_preset("plain-s-256")
    text = describe_run(replace(preset, model="SiT-B/2", seed=7))
    assert "--model SiT-B/2 (preset: SiT-S/2)" in text and text.count("(preset") == 1


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="--preset is 'digit'; it must be digits, haste-xl-256 or another"):
        preset_config("digit")


def test_an_unknown_student_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--model must be one of SiT-S/1, .*SiT-Digits/2.*, got 'SiT-M/2'"):
        model_depth("SiT-M/2")
