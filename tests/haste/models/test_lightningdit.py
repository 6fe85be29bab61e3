"""Files of LightningDiT's trainer: whose they are, and that what is read of them computes the public model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from haste.errors import UserError
from haste.generation.loaded import latent_format, load_checkpoint
from haste.models import CheckpointFile, SiT, get_family
from haste.training.checkpoint import loaded_model, read_checkpoint
from public_names import plain_forward
from torch import Tensor

PARTS = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
SHAPE = {"input_size": 3, "patch_size": 1, "in_channels": 32, "hidden_size": 32, "depth": 2, "num_heads": 4}
CONFIG = {
    "ckpt_path": "",
    "data": {"image_size": 48, "num_classes": 1000, "latent_norm": True, "latent_multiplier": 1.0},
    "vae": {"model_name": "vavae_f16d32", "downsample_ratio": 16},
    "model": {"model_type": "LightningDiT-XL/1", "use_qknorm": False, "use_swiglu": True, "wo_shift": False},
    "train": {"max_steps": 80000, "global_batch_size": 1024},
    "transport": {"path_type": "Linear", "prediction": "velocity", "train_eps": None, "use_lognorm": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_known_size_of_that_shape(monkeypatch) -> None:
    size = {name: SHAPE[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    monkeypatch.setitem(get_family("sit").sizes, "LightningDiT-Tiny/1", {**size, **PARTS})


def weights(**changes: Any) -> dict[str, Tensor]:
    """Of the public names, none of them zero. t = 1 is data, as LightningDiT has it."""
    torch.manual_seed(0)
    model = SiT(**{**SHAPE, **PARTS, **changes}).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.state_dict()


def write(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def assert_reads_as(path: Path, state: dict[str, Tensor], heads: int = 4, **settings: Any) -> dict[str, Any]:
    """Its velocity, noise minus data at t = 1 for noise, is the public one with both signs turned."""
    checkpoint = read_checkpoint(path, **settings)
    model = loaded_model(checkpoint).double()
    x, y = torch.randn(4, 32, 3, 3).double(), torch.tensor([1, 7, 999, 1000])
    t = torch.tensor([0.0, 0.2, 0.9, 1.0]).double()
    with torch.no_grad():
        got, public = model(x, t, y).prediction, plain_forward(state, x, 1 - t, y, heads, patch=1)
    torch.testing.assert_close(got, -public, rtol=1e-4, atol=1e-4)  # read as float32
    return checkpoint


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"positions": "sincos"}, {"mlp": "gelu"}], ids=str)
def test_what_its_trainer_saves_is_read_as_its_model(tmp_path, changes):
    state = weights(**changes)
    other = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    file = write(tmp_path / "0080000.pt", {"model": other, "ema": state, "opt": {}, "config": CONFIG})
    checkpoint = assert_reads_as(file, state)
    assert checkpoint["convention"] == "sit"
    for name, value in {**PARTS, "qk_norm": False, **changes}.items():
        assert checkpoint["model_config"].get(name, {"positions": "sincos", "mlp": "gelu"}.get(name)) == value
    assert checkpoint["args"] == {"model": "LightningDiT-XL/1", "num_classes": 1000, "resolution": 48,
                                  "path_type": "linear", "prediction": "v"}  # fmt: skip


def test_the_published_file_is_known_by_its_name(tmp_path):
    state = weights()
    file = write(tmp_path / "lightningdit-xl-imagenet256-800ep.pt", {"ema": state})
    loaded = load_checkpoint(write(file, {"ema": state}), device="cpu")
    assert loaded.family.size_name(loaded.model_config) == "LightningDiT-Tiny/1"
    assert loaded.guided_channels == 3 and loaded.rounded
    assert_reads_as(file, state)
    with pytest.raises(UserError, match=r"--convention must be sit \(.*LightningDiT.*by the name of .*, got repa"):
        read_checkpoint(file, convention="repa")
    unnamed = write(tmp_path / "weights.pt", state)
    with pytest.raises(UserError, match="--convention must be given for .*weights.pt"):
        read_checkpoint(unnamed)
    assert_reads_as(unnamed, state, convention="sit")


def test_what_predicts_sigma_is_left_out(tmp_path):
    """learn_sigma doubles the output, of which its forward returns the first half and trains no other."""
    state = weights()
    twice = {**state}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        twice[name] = torch.cat([state[name], torch.zeros_like(state[name])])
    assert_reads_as(write(tmp_path / "last.pt", {"ema": twice, "config": CONFIG}), state)


def test_a_model_without_shifts_is_refused_by_name(tmp_path):
    state = weights()
    for name, value in state.items():
        if name.startswith("blocks") and "adaLN" in name:
            state[name] = value[: 4 * 32]
    file = write(tmp_path / "last.pt", {"ema": state, "config": CONFIG})
    with pytest.raises(UserError, match=r"last\.pt cannot be used: .* LightningDiT trained with wo_shift"):
        read_checkpoint(file)


@pytest.mark.parametrize(("name", "value"), [("prediction", "noise"), ("path_type", "VP")])
def test_what_predicts_no_known_velocity_is_refused_by_name(name, value):
    settings = {"train_eps": None, "prediction": "velocity", "path_type": "Linear", name: value}
    file = CheckpointFile(weights(), settings, {}, Path("last.pt"))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}"):
        get_family("sit").foreign.find_convention(file)


def test_its_latents_need_the_vae_and_take_its_statistics(tmp_path, monkeypatch):
    loaded = load_checkpoint(write(tmp_path / "lightningdit.pt", {"ema": weights()}), device="cpu")
    with pytest.raises(UserError, match="--vae must have latents of 32 channels"):
        latent_format(loaded)
    with pytest.raises(UserError, match="--vae-stats must be left out without --vae, got stats.pt"):
        latent_format(loaded, None, "stats.pt")
    asked = []
    monkeypatch.setattr("haste.generation.loaded.LatentFormat.of", lambda *given: asked.append(given) or SimpleLatents)
    assert latent_format(loaded, "vavae.pt", "stats.pt") is SimpleLatents
    assert asked == [("vavae.pt", "stats.pt")]


class SimpleLatents:
    channels = 32
