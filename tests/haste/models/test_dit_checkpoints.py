"""DiT and its public files: names, shapes and the forward pass, files in and out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.generation.loaded import load_checkpoint
from haste.models import DIT_MODELS, build_model, get_family
from haste.models.dit_checkpoints import DiTCheckpoints
from haste.training.checkpoint import read_checkpoint
from public_dit import ARGS, NAME, REST, SHAPE, public_file, random_dit, without_sigma, write
from public_names import plain_forward, public_shapes
from torch import nn

CHECKPOINTS = DiTCheckpoints()


@pytest.fixture(autouse=True)
def _a_known_size_of_that_shape(monkeypatch):
    monkeypatch.setitem(get_family("dit").sizes, NAME, SHAPE)


def load(path: Path, **settings):
    return load_checkpoint(path, device="cpu", **settings)


def on_meta(name: str, z_dims=()) -> nn.Module:
    with torch.device("meta"):
        config = {"input_size": 32, "in_channels": 4, "num_classes": 1000, **DIT_MODELS[name]}
        return build_model({"family": "dit", **config}, z_dims=z_dims)


# ---- the public model ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DiT-XL/2", public_shapes(28, 1152, 256, 2, 4, outputs=2)),
        ("DiT-L/4", public_shapes(24, 1024, 64, 4, 4, outputs=2)),
        ("DiT-B/2", public_shapes(12, 768, 256, 2, 4, outputs=2)),
        ("DiT-S/8", public_shapes(12, 384, 16, 8, 4, outputs=2)),
    ],
)
def test_names_and_shapes_are_the_public_ones(name, expected):
    assert {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()} == expected


def test_every_published_size_is_there():
    sizes = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    assert set(DIT_MODELS) - {NAME} == {*sizes, "DiT-Digits/2"}


def test_parameters_are_as_many_as_published():
    """675,129,632 as the public trainer logs them, among them the positions, which are not trained."""
    model = on_meta("DiT-XL/2")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_the_order_of_parameters_is_the_public_one():
    """An optimizer's state in a public checkpoint refers to parameters by their number."""
    names = [name for name, _ in random_dit(depth=1).named_parameters()]
    assert [name.removesuffix(".weight") for name in names if not name.endswith(".bias")] == [
        "pos_embed", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table",
        "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
        "blocks.0.adaLN_modulation.1", "final_layer.linear", "final_layer.adaLN_modulation.1",
    ]  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
def test_forward_is_what_the_paper_says(fused):
    """Noise, then variance, at whole times that are embedded as they are."""
    model = random_dit(fused_attn=fused).double()
    torch.manual_seed(1)
    x, t, y = torch.randn(4, 4, 4, 4).double(), torch.tensor([0, 1, 512, 999]), torch.tensor([1, 7, 4, 10])
    expected = plain_forward(model.state_dict(), x, t.double(), y, heads=2, patch=2)
    for times in (t, t.double()):
        torch.testing.assert_close(model(x, times, y).prediction, expected, rtol=1e-10, atol=1e-10)
    assert expected.shape == (4, 8, 4, 4)


# ---- files in ----


def test_the_three_kinds_of_public_files_are_the_same_model(tmp_path):
    content = public_file()
    trainers = load(write(tmp_path / "000-DiT-XL-2" / "checkpoints" / "0050000.pt", content))
    bare = load(write(tmp_path / "DiT-XL-2-256x256.pt", content["ema"]))
    renamed = load(write(tmp_path / "last.pt", {"ema": content["ema"]}), convention="dit")
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([1, 10])
    expected = random_dit(1)(x, t, y).prediction
    for loaded in (trainers, bare, renamed):
        assert torch.equal(loaded.model(x, t, y).prediction, expected)
        assert loaded.family.name == "dit" and loaded.convention == "dit"
        assert loaded.rounded and loaded.guided_channels == 3
    assert load(trainers.checkpoint.parents[1]).checkpoint == trainers.checkpoint
    assert torch.equal(load(trainers.checkpoint, ema=False).model.blocks[0].mlp.fc1.weight,
                       random_dit().blocks[0].mlp.fc1.weight)  # fmt: skip


def test_dits_settings_under_our_names(tmp_path):
    assert CHECKPOINTS.convert_settings({**ARGS, "path_type": None}, "dit") == {
        "model": "DiT-XL/2", "num_classes": 10, "resolution": 32, "vae": "ema", "prediction": "noise",
    }  # fmt: skip
    loaded = load(write(tmp_path / "last.pt", public_file()), assume={"path_type": "linear", "num_classes": 3})
    assert (loaded.config.resolution, loaded.config.vae, loaded.num_classes) == (32, "ema", 10)
    assert "path_type" not in loaded.recorded["args"]


def test_dits_sampler_guides_three_of_more_channels():
    assert [CHECKPOINTS.guided_channels("dit", n) for n in (1, 3, 4, 16)] == [None, None, 3, 3]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"diffusion_steps": 500}, "must be trained with --diffusion-steps 1000, as DiT, got 500"),
        ({"diffusion_steps": "1000"}, "must be trained with --diffusion-steps 1000, as DiT, got '1000'"),
        ({"noise_schedule": "squaredcos_cap_v2"}, "must be trained with --noise-schedule linear, as DiT, got "),
        ({"predict_xstart": True}, "must be trained with --predict-xstart False, as DiT, got True"),
        ({"learn_sigma": False}, "must be trained with --learn-sigma True, as DiT, got False"),
        ({"path_type": "Linear"}, "must be of a DiT, which predicts noise and has no path, got --path-type Linear"),
        ({"image_size": "large"}, "resolution of args of .* must be an integer, got 'large'"),
    ],
)
def test_a_run_that_trained_another_model_is_refused(tmp_path, change, sentence):
    path = write(tmp_path / "0050000.pt", public_file(**change))
    with pytest.raises(UserError, match=sentence):
        load(path)


def test_settings_of_descendants_that_make_the_same_model_are_read(tmp_path):
    content = public_file(diffusion_steps=1000, noise_schedule="linear", predict_xstart=False, learn_sigma=True)
    assert load(write(tmp_path / "0050000.pt", content)).convention == "dit"


@pytest.mark.parametrize("name", ["0050000.pt", "DiT-XL-2-256x256.pt", "bare.pt"])
def test_a_model_of_noise_alone_is_refused(tmp_path, name):
    weights = without_sigma(public_file()["ema"])
    content = {**public_file(), "model": weights, "ema": weights} if name == "0050000.pt" else weights
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=r"must be of a DiT with learn_sigma, .* got final_layer.linear of 16 outputs"):
        load(path, convention="dit" if name == "bare.pt" else None)


ADAPTERS = {
    "LoRA": ["blocks.0.attn.qkv.lora_A", "blocks.2.mlp.fc1.lora_B.default.weight"],
    "DiffFit": ["blocks.0.gamma1", "blocks.2.gamma6", "final_layer.gamma"],
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in ADAPTERS.items() for name in names])
@pytest.mark.parametrize("kind", ["whole", "bare", "alone"])
def test_what_fine_tuning_adds_must_be_merged_first(tmp_path, method, name, kind):
    added = {name: torch.ones(16)}
    content = public_file()
    if kind == "whole":
        content = {**content, "model": {**content["model"], **added}, "ema": {**content["ema"], **added}}
    else:
        content = {**content["ema"], **added} if kind == "bare" else added
    path = write(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match=f"last.pt must be merged into .* first, got {name}, which {method} adds"):
        load(path)


def test_other_names_are_told_as_before(tmp_path):
    weights = {**public_file()["ema"], "blocks.0.ls1.weight": torch.ones(16)}
    with pytest.raises(UserError, match="does not hold the weights of DiT of its size: blocks.0.ls1.weight does not"):
        load(write(tmp_path / "DiT.pt", weights))


def test_an_unknown_size_is_told_as_dits(tmp_path):
    weights = random_dit(depth=2).state_dict()
    with pytest.raises(UserError, match="the weights are a DiT of depth 2 and width 16, which none of the known"):
        load(write(tmp_path / "DiT.pt", weights))


# ---- files out ----


def public_module(names: dict[str, tuple]) -> nn.Module:
    """Modules that have parameters of these names and shapes, and nothing else."""
    root = nn.Module()
    for name, shape in names.items():
        *parents, last = name.split(".")
        inside = root
        for parent in parents:
            if not hasattr(inside, parent):
                inside.add_module(parent, nn.Module())
            inside = getattr(inside, parent)
        inside.register_parameter(last, nn.Parameter(torch.empty(shape)))
    return root


def ours(path: Path) -> Path:
    """A checkpoint of haste of a run that aligned features, with the projectors of its teacher."""
    weights = random_dit(z_dims=(6,), projector_dim=8).state_dict()
    config = {"family": "dit", **SHAPE, **REST, "projector_dim": 8}
    args = {"preset": "", "model": NAME, "path_type": "linear", "prediction": "noise"}
    return write(path, {"model": weights, "ema": weights, "opt": {}, "steps": 4, "model_config": config, "args": args})


def test_ours_load_strictly_in_the_public_model(tmp_path):
    """Without the projectors, which `load_checkpoint` leaves out."""
    path = ours(tmp_path / "0000004.pt")
    loaded = load(path)
    names = public_shapes(3, 16, 4, 2, 4, outputs=2)
    public = public_module({**names, "y_embedder.embedding_table.weight": (11, 16)})
    public.load_state_dict(loaded.model.state_dict(), strict=True)
    assert any(name.startswith("projectors.") for name in read_checkpoint(path)["ema"])
    write(tmp_path / "DiT-XL-2-256x256.pt", loaded.model.state_dict())
    again = load(tmp_path / "DiT-XL-2-256x256.pt").model.state_dict()
    assert list(again) == list(loaded.model.state_dict())
    assert all(torch.equal(value, again[name]) for name, value in loaded.model.state_dict().items())


def test_ours_need_no_convention_and_are_sampled_as_dits(tmp_path):
    path = ours(tmp_path / "0000004.pt")
    for convention in (None, "dit"):
        loaded = load(path, convention=convention)
        assert (loaded.convention, loaded.rounded, loaded.guided_channels) == ("dit", True, 3)
        assert loaded.recorded["args"]["path_type"] == "linear" and loaded.recorded["z_dims"] == [6]
    for convention in ("repa", "sit"):
        with pytest.raises(
            UserError, match=rf"--convention must be dit \(.*\), by the content of .*, got {convention}"
        ):
            load(path, convention=convention)
