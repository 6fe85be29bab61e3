from dataclasses import replace

import pytest
from haste.alignment.layers import PAPER_LAYER_MAPS, LayerMap
from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.recipes import RECIPES, describe_recipe, describe_run, recipe_config
from haste.training.students import student_shape


def test_no_recipe_is_the_trainers_own_values():
    assert recipe_config("") == TrainConfig()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_whole_run(name):
    config = recipe_config(name)
    config.check()
    assert config.recipe == name
    assert student_shape(config.model)["depth"] > 0
    assert config.early_stop_point < config.max_train_steps
    assert describe_recipe(name).startswith(f"--exp-name {name} ")


def test_every_size_has_every_method_at_both_resolutions():
    sizes, methods = ("s", "b", "l", "xl"), ("haste", "repa", "plain")
    wanted = {f"{method}-{size}-{side}" for method in methods for size in sizes for side in (256, 512)}
    assert wanted | {"digits"} == RECIPES.keys()


def test_the_papers_settings():
    xl = recipe_config("haste-xl-512")
    assert (xl.model, xl.resolution, xl.encoder_depth, xl.early_stop_point) == ("SiT-XL/2", 512, 8, 300_000)
    assert LayerMap.parse(xl.layer_map) == PAPER_LAYER_MAPS["SiT-XL"]
    b = recipe_config("haste-b-256")
    assert LayerMap.parse(b.layer_map) == PAPER_LAYER_MAPS["SiT-B"]
    assert (b.encoder_depth, b.early_stop_point, b.attn_coeff, b.proj_coeff) == (5, 100_000, 0.5, 0.5)
    repa = recipe_config("repa-l-256")
    assert (repa.attn_coeff, repa.proj_coeff, repa.encoder_depth, repa.early_stop_point) == (0.0, 0.5, 8, -1)
    assert recipe_config("plain-s-256").teachers == []


def test_a_run_is_described_by_what_it_has():
    recipe = recipe_config("plain-s-256")
    assert describe_run(recipe) == describe_recipe("plain-s-256")
    text = describe_run(replace(recipe, model="SiT-B/2", seed=7))
    assert "--model SiT-B/2 (recipe: SiT-S/2)" in text and text.count("(recipe") == 1


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="--recipe is 'digit'; it must be digits, haste-xl-256 or another"):
        recipe_config("digit")


def test_an_unknown_student_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--model must be one of SiT-S/1, .*SiT-Digits/2.*, got 'SiT-M/2'"):
        student_shape("SiT-M/2")
