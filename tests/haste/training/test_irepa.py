"""Runs of iREPA: whole, killed, resumed; the settings and the weights of its own trainer."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from haste.errors import UserError
from haste.generation import load_checkpoint
from haste.models import get_family
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.config import TrainConfig
from haste.training.settings import differing_settings, known_settings
from haste.training.trainer import train
from small_models import random_sit
from training_runs import assert_a_killed_run_is_the_unbroken_one, read_log

IREPA = {"projection_layer_type": "conv", "spnorm_method": "zscore", "zscore_alpha": 0.6}
XAR = {"model": "xAR-Tiny/2", "dropout": 0.1}


@pytest.mark.parametrize(("family", "stop"), [({}, 9), (XAR, 3)])  # after alignment ends, and before
def test_a_killed_run_is_the_unbroken_one(make_config, monkeypatch, stop, family):
    def make(**changes):
        return make_config(**IREPA, **family, **changes)

    assert_a_killed_run_is_the_unbroken_one(make, monkeypatch, stop)


def test_a_run_holds_the_public_weights_and_is_loaded_and_its_loss_is_not_repas(make_config):
    result = train(make_config(**IREPA, attn_coeff=0.0, early_stop_point=-1))
    path = checkpoint_path(result.folder / "checkpoints", 12)
    saved = read_checkpoint(path)
    assert saved["model_config"]["projection_layer_type"] == "conv"
    assert saved["model"]["projectors.0.projection_layer.weight"].shape == (16, 16, 3, 3)
    assert load_checkpoint(path).recorded["z_dims"] == [16]
    repa = train(make_config(exp_name="repa", attn_coeff=0.0, early_stop_point=-1))
    losses = [read_log(run.folder)[0] for run in (result, repa)]
    assert losses[0]["loss"] == losses[1]["loss"] and losses[0]["proj_loss"] != losses[1]["proj_loss"]


def test_a_run_is_not_gone_on_with_under_another_projector_or_normalisation(make_config):
    train(make_config(**IREPA, max_train_steps=2))
    for change in ({"projection_layer_type": "mlp"}, {"spnorm_method": "none"}, {"zscore_alpha": 0.8}):
        with pytest.raises(UserError, match="--" + next(iter(change)).replace("_", "-")):
            train(make_config(**{**IREPA, **change}))


def test_what_has_no_effect_makes_no_other_run():
    config = TrainConfig(exp_name="run", **IREPA)
    assert differing_settings(asdict(config), replace(config, projector_dim=7)) == []
    plain = TrainConfig(exp_name="run")
    assert differing_settings(asdict(plain), replace(plain, zscore_alpha=0.8)) == []
    vanilla = replace(plain, proj_coeff=0.0)
    assert differing_settings(asdict(vanilla), replace(vanilla, **IREPA)) == []


# ---- iREPA's own trainer ----

PUBLIC = {
    "model": "SiT-B/2", "projection_layer_type": "conv", "proj_kwargs_kernel_size": 3, "spnorm_method": "zscore",
    "zscore_alpha": 0.6, "proj_coeff": "0.5", "projection_loss_type": "cosine", "enc_type": "dinov2-vit-b",
}  # fmt: skip


def test_the_settings_of_its_trainer_are_read():
    known = known_settings(PUBLIC, "its args")
    assert {name: known[name] for name in IREPA} == IREPA and known["proj_coeff"] == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"projection_layer_type": "linear"}, "projection_layer_type of its args must be"),
        ({"projection_loss_type": "cosine,mse"}, "projection_loss_type of its args must be cosine, got cosine,mse"),
        ({"proj_kwargs_kernel_size": 5}, "proj_kwargs_kernel_size of its args must be 3, got 5"),
        ({"proj_coeff": "0.5,0.5"}, "proj_coeff of its args must be a number, got 0.5,0.5"),
        ({"spnorm_method": "layernorm"}, "spnorm_method of its args must be"),
    ],
)
def test_settings_that_are_not_here_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        known_settings({**PUBLIC, **change}, "its args")


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_its_checkpoints_are_read_under_our_names(kind, tmp_path):
    model = random_sit(z_dims=(6,), projector_dim=8, projection_layer_type=kind)
    weights = {
        name.replace("projectors.0.", "projectors.0.projection_layer.") if kind == "mlp" else name: value
        for name, value in model.state_dict().items()
    }
    assert any(name.startswith("projectors.0.projection_layer.") for name in weights)
    config = get_family("sit").infer_config(weights | _of_a_known_size(weights), {"num_classes": 10})
    assert config["projection_layer_type"] == kind and config["projector_dim"] == (8 if kind == "mlp" else 2048)
    renamed = get_family("sit").foreign.rename(weights)
    assert list(renamed) == list(model.state_dict())


def _of_a_known_size(weights):
    """The embedding of SiT-Digits/2's width, by which its heads are known; depth is told by names."""
    width = 96
    more = {f"blocks.{n}.x": torch.zeros(1) for n in range(6)}
    return {
        **more,
        "pos_embed": torch.zeros(1, 16, width),
        "x_embedder.proj.weight": torch.zeros(width, 4, 2, 2),
        "y_embedder.embedding_table.weight": torch.zeros(11, width),
    }
