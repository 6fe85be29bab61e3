"""Whose a checkpoint is: by what it tells, or by --convention; and what predicts no velocity is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.training.conventions import find_convention, guided_channels, our_settings

EMBED = torch.ones(16, 4, 2, 2)
PLAIN = {"x_embedder.proj.weight": EMBED, "final_layer.linear.weight": torch.ones(16, 16)}
ZEROS = torch.cat([torch.ones(4, 4, 16), torch.zeros(4, 4, 16)], dim=1).view(32, 16)
UNTRAINED = {**PLAIN, "final_layer.linear.weight": ZEROS}
TRAINED = {**PLAIN, "final_layer.linear.weight": torch.ones(32, 16)}
PROJECTED = {**PLAIN, "projectors.0.0.weight": torch.ones(8, 16)}

SIT_ARGS = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "train_eps": 1e-5, "image_size": 256,
            "vae": "ema", "cfg_scale": 4.0, "num_classes": 1000, "model": "SiT-XL/2", "epochs": 1400}  # fmt: skip
REPA_ARGS = {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b", "proj_coeff": 0.5}


def found(weights=PLAIN, args=None, content=None, name="last.pt", given=None):
    return find_convention(content or {}, weights, args or {}, Path("exps") / name, given)


@pytest.mark.parametrize(
    ("case", "convention"),
    [
        ({"content": {"model_config": {"depth": 1}}}, "repa"),
        ({"content": {"steps": 4}}, "repa"),
        ({"args": REPA_ARGS}, "repa"),
        ({"weights": PROJECTED}, "repa"),
        ({"args": SIT_ARGS}, "sit"),  # also without learn_sigma, when its shapes are REPA's
        ({"args": {"path_type": "GVP"}}, "sit"),
        ({"args": {"prediction": "velocity"}}, "sit"),
        ({"weights": UNTRAINED}, "sit"),  # what predicts sigma is still as it was initialised
        ({"weights": TRAINED, "name": "SiT-XL-2-256x256.pt"}, "sit"),
        ({"given": "sit"}, "sit"),
        ({"given": "repa"}, "repa"),
        ({"weights": TRAINED, "given": "sit"}, "sit"),
    ],
)
def test_whose_it_is(case, convention):
    assert found(**case) == convention


@pytest.mark.parametrize("case", [{}, {"weights": TRAINED}, {"name": "SiT-XL-2-256x256.pt"}])
def test_where_nothing_tells_the_flag_is_asked_for(case):
    with pytest.raises(UserError, match=r"--convention must be given for exps/.*: repa .* or sit"):
        found(**case)


def test_a_flag_against_what_the_file_tells_is_refused():
    with pytest.raises(UserError, match=r"--convention must be repa, as exps/last\.pt tells, got sit"):
        found(args=REPA_ARGS, given="sit")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ({"args": {**SIT_ARGS, "path_type": "VP"}}, "--path-type VP"),
        ({"args": {**SIT_ARGS, "prediction": "noise"}}, "--prediction noise"),
        ({"args": {**SIT_ARGS, "prediction": "score"}}, "--prediction score"),
        ({"args": {"model": "DiT-XL/2", "image_size": 256}, "weights": TRAINED}, "DiT-XL/2, which predicts noise"),
        ({"name": "DiT-XL-2-256x256.pt", "weights": TRAINED}, "DiT, by its name, which predicts noise"),
        ({"name": "DiT-XL-2-256x256.pt", "weights": UNTRAINED}, "DiT, by its name, which predicts noise"),
    ],
)
@pytest.mark.parametrize("given", [None, "sit"])
def test_what_predicts_no_velocity_is_refused_by_name(case, name, given):
    with pytest.raises(UserError, match=name):
        found(**case, given=given)


def test_sits_settings_under_our_names():
    assert our_settings({**SIT_ARGS, "path_type": "GVP"}, "sit") == {
        "model": "SiT-XL/2", "num_classes": 1000, "resolution": 256, "path_type": "cosine", "prediction": "v",
    }  # fmt: skip
    assert our_settings({}, "sit") == {"path_type": "linear", "prediction": "v"}
    assert our_settings(REPA_ARGS, "repa") == REPA_ARGS


def test_sits_sampler_guides_three_of_more_channels():
    assert [guided_channels("sit", n) for n in (1, 3, 4)] == [None, None, 3]
    assert guided_channels("repa", 4) is None
