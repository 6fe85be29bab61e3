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
from haste.evaluation.image_readers import open_images

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
            assert "Args:" in value.__doc__ and "Raises:" in value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'train_model'"):
        haste.train_model  # noqa: B018


def test_a_script_trains_resumes_loads_samples_and_caches(tmp_path):
    """One process, as a user's script; the run has two steps, then two more."""
    script = """
import dataclasses, json, sys
import haste

config = haste.TrainConfig(
    output_dir=sys.argv[1], exp_name="first", data_dir="digits", resolution=8, model="SiT-Digits/2", enc_type=None,
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
    with pytest.raises(ValueError, match="step_noise ended"):
        sample(model, noise, condition, step_noise=[torch.from_numpy(kicks[0])], **settings)
    with pytest.raises(ValueError, match="step_noise has shape"):
        sample(model, noise, condition, step_noise=[torch.zeros(2)], **settings)
