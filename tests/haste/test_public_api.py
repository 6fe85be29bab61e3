"""The public API, by scripts as a user writes them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import haste
import numpy as np
import pytest
import torch
from digits_run import write_run
from haste.data.images import open_images

HEAVY = ("torch", "numpy", "transformers", "diffusers", "accelerate", "PIL", "tyro", "haste_ext")


def run_script(code: str, *arguments: object) -> str:
    """What a script prints, in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("exps"))


@pytest.mark.parametrize(
    "code", ["import haste", "import sys; sys.argv = ['haste', '--help']; from haste.cli.main import main"]
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    if "argv" in code:
        code += "\ntry: main()\nexcept SystemExit: pass"
    print_heavy = f"\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(run_script(code + print_heavy).splitlines()[-1]) == []


def test_every_name_is_there_and_documented():
    assert set(haste.__all__) <= set(dir(haste))
    for name in haste.__all__:
        value = getattr(haste, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert all(p.annotation is not p.empty for p in inspect.signature(value).parameters.values()), name
            assert name == "train" or "Args:" in value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'train_model'"):
        haste.train_model  # noqa: B018


def test_a_script_trains_resumes_loads_samples_and_caches(tmp_path):
    """One process, as a user's script; the run has two steps, then two more."""
    script = """
import dataclasses, json, sys
import haste

config = haste.TrainConfig(
    output_dir=sys.argv[1], exp_name="first", data_dir="digits", resolution=8, model="SiT-Digits/2",
    proj_coeff=0, attn_coeff=0, batch_size=8, max_train_steps=2, checkpointing_steps=2, mixed_precision="no",
)
result = haste.train(config)
again = haste.train(dataclasses.replace(config, max_train_steps=4))
loaded = haste.load_checkpoint(again.folder)
images = haste.sample(loaded, labels=[3, 1, 4], num_steps=4, cfg_scale=1.5)
fast = haste.sample(again.folder, labels="balanced", num_images=5, num_steps=8, fast=True)
cached = haste.enable_cache(loaded.model, num_steps=8)
plain = haste.disable_cache(cached)
print(json.dumps([result.step, again.step, loaded.step, images.shape, str(images.dtype), fast.shape,
                  plain is loaded.model]))
"""
    printed = json.loads(run_script(script, tmp_path).splitlines()[-1])
    assert printed == [2, 4, 4, [3, 8, 8, 3], "uint8", [5, 8, 8, 3], True]


# -- sample -----------------------------------------------------------------------------------------------------


def test_images_depend_on_their_number_not_on_the_batch_or_the_form_of_the_labels(run):
    settings = {"num_steps": 3, "global_seed": 5}
    images = haste.sample(run, [3, 1, 4, 1], **settings)
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    loaded = haste.load_checkpoint(str(run))
    for labels in (np.array([3, 1, 4, 1]), torch.tensor([3, 1, 4, 1]), "3,1,4,1"):
        assert (haste.sample(loaded, labels, num_images=4, **settings) == images).all()
    apart = haste.sample(run, [3, 1, 4, 1], batch_size=3, **settings)
    assert np.abs(apart.astype(int) - images.astype(int)).max() <= 1
    assert (haste.sample(run, 3, **settings)[0] == images[0]).mean() > 0.99
    assert haste.sample(run, num_steps=1).shape == (16, 8, 8, 3)


def test_a_folder_gets_the_same_images(run, tmp_path):
    settings = {"num_steps": 3, "labels": [3, 1, 4]}
    images = haste.sample(run, **settings)
    assert (haste.sample(run, folder=tmp_path, **settings) == images).all()
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(open_images(folder, "--samples")) == 3
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert (haste.sample(haste.load_checkpoint(run), folder=tmp_path, **settings) == images).all()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        ({"labels": [10]}, haste.UserError, "--labels"),
        ({"cfg_scale": 0.5}, haste.UserError, "--cfg-scale"),
        ({"interval": 3}, haste.UserError, "--interval"),
        ({"fast": True, "cache": "taylor"}, haste.UserError, "--cache"),
        ({"steps": 3}, TypeError, "steps"),
        ({"vae": "mse"}, haste.UserError, "--vae"),
    ],
)
def test_settings_that_cannot_be_are_named(run, settings, error, names):
    with pytest.raises(error, match=names):
        haste.sample(run, **settings)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(haste.UserError, match="nothing.pt"):
        haste.sample(tmp_path / "nothing.pt")


# -- the pieces, for a trainer of one's own ----------------------------------------------------------------------


def test_a_run_from_elsewhere_is_replayed_number_by_number():
    """Given its noise and that of each step, the SDE's sampler repeats numpy's arithmetic."""
    from haste.samplers import sample, time_grid

    rng = np.random.default_rng(0)
    x0, kicks = rng.standard_normal((2, 1, 4, 4)), rng.standard_normal((4, 2, 1, 4, 4))
    label = np.array([1.0, 2.0]).reshape(2, 1, 1, 1)

    x, grid = x0, time_grid("euler-maruyama", 5).numpy()
    for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        v = np.tanh(x) * t + label
        x = x + ((2 - t) * v + x) * (t_next - t)  # the linear path's drift
        if step < 4:
            x = x + np.sqrt(2 * t * (t - t_next)) * kicks[step]

    def model(x, t, condition):
        return x.tanh() * t.view(-1, 1, 1, 1) + condition.view(-1, 1, 1, 1)

    noise, condition = torch.from_numpy(x0), torch.tensor([1.0, 2.0], dtype=torch.float64)
    settings = {"num_steps": 5, "sampler": "euler-maruyama"}
    replayed = sample(model, noise, condition, step_noise=map(torch.from_numpy, kicks), **settings)
    np.testing.assert_allclose(replayed.numpy(), x, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="step_noise must have noise for every step"):
        sample(model, noise, condition, step_noise=[torch.from_numpy(kicks[0])], **settings)
    with pytest.raises(ValueError, match="step_noise must have the shape of noise"):
        sample(model, noise, condition, step_noise=[torch.zeros(2)], **settings)


def test_evaluate_compares_features_of_ones_own(tmp_path):
    features = np.random.default_rng(0).standard_normal((400, 3))
    np.save(tmp_path / "real.npy", features)
    np.save(tmp_path / "far.npy", features + 1.0)
    scores = haste.evaluate(tmp_path / "far.npy", "stored", str(tmp_path / "real.npy"), metrics=("fd", "recall"))
    assert scores["fd"].value == pytest.approx(3.0) and 0 < scores["recall"].value < 1
    assert haste.evaluate(tmp_path / "real.npy", "stored", str(tmp_path / "real.npy"))["fd"].value < 1e-6
    with pytest.raises(haste.UserError, match="--samples|--features|nothing.npy"):
        haste.evaluate(tmp_path / "nothing.npy", "stored", str(tmp_path / "real.npy"))


class SomebodysModel(torch.nn.Module):
    """Patches of 2 x 2 and one layer of attention, whose q and k it returns: nothing of haste's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = torch.nn.Linear(4, 24), torch.nn.Linear(24, 72), torch.nn.Linear(24, 4)

    def forward(self, x):
        tokens = self.embed(torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        tokens = tokens + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pixels = self.out(tokens).mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))
        return torch.nn.functional.pixel_shuffle(pixels, 2), (q, k), tokens


def test_a_trainer_of_ones_own_aligns_a_model_that_haste_does_not_know(tmp_path):
    from haste.transport import interpolate, sample_time, velocity_loss
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, num_channels=1)).save_pretrained(tmp_path)
    model = SomebodysModel()
    aligner = haste.Aligner.from_pretrained(str(tmp_path), "0:1", grid=4)
    projector = torch.nn.Linear(24, *aligner.z_dims)
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=1e-2)
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    alignment = []
    for _ in range(30):
        x_t, target = interpolate(images, torch.randn_like(images), t := sample_time(8))
        velocity, queries_keys, hidden = model(x_t)
        losses = aligner.losses([queries_keys], [projector(hidden)], aligner.teacher_outputs(images))
        alignment.append(aligner.weigh(losses))
        (velocity_loss(velocity, target) + alignment[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert t.shape == (8,) and alignment[-1] < alignment[0] - 0.2


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"mode": "euler"}, "mode must be one of 'ode', 'sde', 'ddim', 'ddpm' or nothing, got 'euler'"),
        ({"num_images": 0}, "num_images must be an integer from 1"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"labels": []}, "labels must be one class or more"),
        ({"folder": 3}, "folder must be a path"),
        ({"per_proc_batch_size": 8}, "settings must be .*, got per_proc_batch_size; pass it as batch_size"),
        ({"ckpt": "a"}, "settings must be .*, got ckpt; pass it as checkpoint"),
    ],
)
def test_sample_names_its_argument(settings, named):
    with pytest.raises((haste.UserError, TypeError), match=f"^{named}"):
        haste.sample("no-such-run", **settings)


@pytest.mark.parametrize("given", [3, None, torch.nn.Linear(1, 1)])
def test_sample_takes_a_path_or_a_loaded_checkpoint(given):
    with pytest.raises(haste.UserError, match="^checkpoint must be a path"):
        haste.sample(given)


@pytest.mark.parametrize("given", [torch.zeros(1), [1], None])
def test_evaluate_refuses_other_samples_before_it_reads_the_reference(given):
    with pytest.raises(
        haste.UserError, match="^samples must be a NumPy array of images, a path or a loaded checkpoint"
    ):
        haste.evaluate(given, "digits", "no-such-reference")


@pytest.mark.parametrize(
    "settings, named",
    [({"ema": "no"}, "ema"), ({"convention": "x"}, "convention"), ({"device": "cud"}, "device"),
     ({"fused_attn": 1}, "fused_attn")],
)  # fmt: skip
def test_load_checkpoint_names_its_argument(settings, named):
    with pytest.raises(haste.UserError, match=f"^{named} must be "):
        haste.load_checkpoint("no-such-run", **settings)


def test_train_takes_a_config():
    with pytest.raises(haste.UserError, match="^config must be a TrainConfig, .* got 'digits'$"):
        haste.train("digits")


@pytest.mark.parametrize("grid", [0, "4"])
def test_an_aligner_has_a_grid_of_tokens(grid):
    with pytest.raises(haste.UserError, match="^grid must be an integer from 1 .*, got "):
        haste.Aligner.from_pretrained("no-such-teacher", grid=grid)
