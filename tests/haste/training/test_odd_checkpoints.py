"""Any part of a checkpoint may be anything: what reads it gives a result or a UserError, and nothing else."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from haste.errors import UserError
from haste.generation.loaded import latent_format, load_checkpoint
from haste.io import save_tensors
from haste.models import SiT, get_family
from haste.training.checkpoint import capture_rng, read_newest_checkpoint
from haste.training.config import TrainConfig
from haste.weights import read_file
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from public_dit import ARGS, NAME, public_file
from public_dit import SHAPE as DIT_SHAPE

SHAPE = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2,
         "num_classes": 3}  # fmt: skip
TRUNK = SiT(**SHAPE).state_dict()
LATENTS = {"vae": "stabilityai/sd-vae-ft-mse", "channels": 4, "factor": 8, "shift": (0.0,) * 4, "scale": (0.2,) * 4}


def whole() -> dict[str, Any]:
    moments = {0: {"step": torch.ones(()), "exp_avg": torch.zeros(1, 4, 16), "exp_avg_sq": torch.zeros(1, 4, 16)}}
    return {
        "model": dict(TRUNK), "ema": dict(TRUNK), "opt": {"state": moments, "param_groups": [{"lr": 1.0}]},
        "args": TrainConfig().to_namespace(), "steps": 4, "model_config": dict(SHAPE), "rng": capture_rng(),
        "termination": {"stopped_at": None, "observed": [(1, 0.5)]}, "data": {"images": 3}, "latents": dict(LATENTS),
        "scaler": {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9,
                   "_growth_tracker": 0},
    }  # fmt: skip


def replaced(place: str, value: Any, make: Callable[[], dict[str, Any]] = whole) -> dict[str, Any]:
    """The whole checkpoint but for what is at a place such as opt.state.0.step."""
    content = copy.deepcopy(make())
    *parents, last = place.split("/")
    inside: Any = content
    for name in parents:
        inside = vars(inside) if isinstance(inside, argparse.Namespace) else inside
        inside = inside[int(name) if name.isdecimal() else name]
    inside = vars(inside) if isinstance(inside, argparse.Namespace) else inside
    inside[int(last) if last.isdecimal() else last] = value
    return content


def read_all(path: Path) -> None:
    """What sampling and what going on read of it."""
    for read in (lambda: latent_format(load_checkpoint(path, device=torch.device("cpu"))),
                 lambda: read_newest_checkpoint(path.parent)):  # fmt: skip
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)


def check(content: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "0000004.pt"
        torch.save(content, path)
        read_all(path)


TENSORS = st.sampled_from([
    torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(()), torch.tensor(float("nan")), torch.ones(0, 4),
    torch.ones(2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.ones(1, device="meta"),
    torch.ones(1).expand(2**20, 2**20), torch.ones(3, 4, 2, 2), torch.ones(1, 4, 16, dtype=torch.bfloat16),
])  # fmt: skip
NAMES = st.sampled_from(["model", "state", "0", "depth", "pos_embed", "blocks.x.y", "blocks.999999999999.a", "é", ""])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**80, -1, 0, 10**400]) | st.floats()
    | st.text(max_size=5) | st.binary(max_size=5) | TENSORS
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(NAMES | st.integers(0, 3), inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=2).map(lambda named: argparse.Namespace(**named))
    ),
    max_leaves=5,
)
# Nothing is made smaller: the parts are small, and each try writes a file.
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
PLACES = [
    *whole(), *(f"args/{name}" for name in ("path_type", "num_classes", "encoder_depth", "model", "vae", "cfg_prob")),
    *(f"model_config/{name}" for name in (*SHAPE, "mlp_ratio", "class_dropout_prob", "attention", "qk_norm")),
    *(f"latents/{name}" for name in LATENTS), "model/pos_embed", "ema/final_layer.linear.bias", "ema/new",
    "opt/state", "opt/state/0", "opt/state/0/step", "opt/state/0/exp_avg", "rng/torch", "rng/cuda", "rng/numpy",
    "rng/python", "termination/observed", "termination/stopped_at", "data/images", "scaler/scale",
]  # fmt: skip


@settings(QUICK, max_examples=50)
@given(st.sampled_from(PLACES), VALUES)
def test_any_part_may_be_anything(place, value):
    check(replaced(place, value))


DIT_PLACES = [
    *public_file(), *(f"args/{name}" for name in (*ARGS, "diffusion_steps", "noise_schedule", "path_type")),
    *(f"model/{name}" for name in ("final_layer.linear.weight", "final_layer.linear.bias", "x_embedder.proj.weight",
                                   "y_embedder.embedding_table.weight", "blocks.0.gamma1")),
]  # fmt: skip


@settings(QUICK, max_examples=50)
@given(st.sampled_from(DIT_PLACES), VALUES)
def test_any_part_of_a_file_of_dits_may_be_anything(place, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(get_family("dit").sizes, NAME, DIT_SHAPE)
        check(replaced(place, value, public_file))


@settings(QUICK, max_examples=30)
@given(st.dictionaries(st.sampled_from(list(whole())), VALUES, max_size=4), st.booleans())
def test_a_file_may_hold_anything(content, with_weights):
    check({**content, **({"model": TRUNK} if with_weights else {})})


@settings(QUICK, max_examples=100)
@given(st.sampled_from(["cut", "byte", "random"]), st.integers(0, 2**16), st.binary(max_size=40))
def test_a_file_may_be_any_bytes(how, at, data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "0000004.pt"
        torch.save({"model": {"a": torch.ones(8)}, "args": argparse.Namespace(seed=3)}, path)
        good = path.read_bytes()
        at %= len(good)
        damaged = {"cut": good[:at], "byte": good[:at] + data + good[at + len(data) :], "random": data}
        path.write_bytes(damaged[how])
        try:
            read_file(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("args", 3, "args of .* must be named settings, got 3"),
        ("args/path_type", 3, "path_type of args of .* must be one of 'linear', 'cosine', got 3"),
        ("model_config", "SiT", "model_config of .* must hold named values"),
        ("model_config/depth", 10**9, "depth of its model must be from 1 to 200"),
        ("model_config/hidden_size", 32, "pos_embed of model of .* must have the shape"),
        ("model_config/input_size", 8190, "at most 262144 tokens"),
        ("ema", [1], r"ema of .* must be a dictionary of weights, got \[1\]"),
        ("ema/new", torch.ones(1), "ema of .*: new does not belong"),
        ("latents/scale", (0.1,), "scale of latents of .* must be 4 finite numbers"),
    ],
)
def test_what_is_odd_is_named_when_it_is_sampled_from(tmp_path, place, value, sentence):
    save_tensors(tmp_path / "odd.pt", replaced(place, value))
    with pytest.raises(UserError, match=sentence):
        latent_format(load_checkpoint(tmp_path / "odd.pt", device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("args/seed", torch.ones(2), "seed of args of .* must be an integer"),
        ("steps", -1, "steps of .* must be a number of steps, got -1"),
        ("steps", "4", "steps of .* must be an integer, got '4'"),
        ("opt", [], "opt of .* must be the state of AdamW"),
        ("opt/state/0/exp_avg", torch.ones(3), "opt of .* must hold a step and two moments of its shape for pos_embed"),
        ("rng/torch", torch.ones(3), "rng of .* must hold the states of random generators"),
        ("termination/observed", 3, "observed of termination of .* must be"),
        ("opt/state/0/exp_avg", torch.full((1, 4, 16), float("nan")), "opt of .* must hold finite moments"),
        ("data", 3, "data of .* must hold named values"),
        ("data", {"images": 3, "files": 3}, "files of data of .* must be"),
        ("latents", 1.5, "latents of .* must hold named values, got 1.5"),
        ("scaler/scale", "a", "scale of scaler of .* must be a number"),
    ],
)
def test_what_is_odd_is_named_when_a_run_goes_on(tmp_path, place, value, sentence):
    save_tensors(tmp_path / "0000004.pt", replaced(place, value))
    with pytest.raises(UserError, match=sentence):
        read_newest_checkpoint(tmp_path)


def test_another_trainers_settings_may_be_anything_where_sampling_does_not_look(tmp_path):
    content = {part: whole()[part] for part in ("model", "ema", "opt", "steps", "model_config")}
    args = {"path_type": "linear", "batch_size": None, "max_grad_norm": None, "legacy": 0, "layer_map": None}
    save_tensors(tmp_path / "0000004.pt", {**content, "args": argparse.Namespace(**args)})
    assert load_checkpoint(tmp_path / "0000004.pt", device=torch.device("cpu")).config.path_type == "linear"
    with pytest.raises(UserError, match="legacy of args of .* must be true or false, got 0"):
        read_newest_checkpoint(tmp_path)


def test_what_cannot_be_used_is_said_before_what_is_missing_to_go_on(tmp_path):
    args = argparse.Namespace(path_type="Linear", prediction="noise")
    save_tensors(tmp_path / "0000004.pt", {"model": dict(TRUNK), "args": args})
    with pytest.raises(UserError, match="got --prediction noise"):
        read_newest_checkpoint(tmp_path)


def test_a_device_and_a_file_that_is_not_there_are_told_apart(tmp_path):
    for path, what in ((Path("/dev/zero"), " is no regular file"), (tmp_path / "none.pt", ", which does not exist")):
        with pytest.raises(UserError, match=f"{path}{what}"):
            load_checkpoint(path, device=torch.device("cpu"))


def test_weights_that_are_not_finite_are_told(tmp_path, caplog):
    content = replaced("ema/pos_embed", torch.full((1, 4, 16), float("nan")))
    save_tensors(tmp_path / "nan.pt", content)
    load_checkpoint(tmp_path / "nan.pt", device=torch.device("cpu"))
    assert "ema of" in caplog.text and "has numbers that are not finite, for example in pos_embed" in caplog.text
