import pytest
from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.recipes import RECIPES, recipe_config
from haste.training.students import student_shape


def test_no_recipe_is_the_papers_values():
    assert recipe_config("") == TrainConfig()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_whole_run(name):
    config = recipe_config(name)
    config.check()
    assert config.recipe == name
    assert student_shape(config.model)["depth"] > 0
    assert config.early_stop_point < config.max_train_steps


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--recipe is 'digit'; it must be one of: digits"):
        recipe_config("digit")


def test_an_unknown_student_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--model is 'SiT-M/2'; it must be one of SiT-S/2, .*SiT-Digits/2"):
        student_shape("SiT-M/2")
