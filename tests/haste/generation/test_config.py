"""The published commands of REPA and HASTE, on checkpoints of theirs that are small."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from drawn_images import read_npz
from haste.cli.main import main
from haste.models import SiT, get_family
from haste.samplers import initial_noise
from haste.samplers.labels import image_generator
from haste.vae import VAE, LatentFormat
from image_files import save_vae
from latent_student import REST, SHAPE, random_weights, write_bare, write_ours, write_repas
from public_dit import NAME as DIT_NAME
from public_dit import SHAPE as DIT_SHAPE
from public_dit import public_file, write
from public_names import plain_forward

# As REPA's README has it, but for the numbers that are small here.
PUBLISHED = [
    "--model", "SiT-XL/2", "--num-fid-samples", "5", "--path-type=linear", "--encoder-depth=2",
    "--projector-embed-dims=6", "--per-proc-batch-size=64", "--mode=sde", "--num-steps=4", "--cfg-scale=1.8",
    "--guidance-high=0.7",
]  # fmt: skip
THE_REST = [
    "--global-seed", "0", "--tf32", "--num_classes", "10", "--resolution", "16", "--no-fused-attn", "--no-qk-norm",
    "--no-heun", "--guidance_low", "0.", "--no-legacy",
]  # fmt: skip


@pytest.fixture
def vae(tmp_path):
    return save_vae(tmp_path / "vae")


def images(tmp_path, ckpt, vae, *flags: str, folder: str = "samples") -> np.ndarray:
    """What a command draws."""
    target = tmp_path / folder
    main(["sample", "--ckpt", str(ckpt), "--vae", str(vae), "--sample-dir", str(target), *flags])
    (npz,) = target.glob("*.npz")
    return read_npz(npz)[0]


def refusal(capsys, tmp_path, ckpt, vae, *flags: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        images(tmp_path, ckpt, vae, *flags)
    assert exit_.value.code == 2 and not (tmp_path / "samples").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("write", [write_repas, write_bare])
def test_a_published_command_draws_as_the_short_one_does(tmp_path, vae, write):
    ckpt = write(tmp_path / "0400000.pt")
    published = images(tmp_path, ckpt, vae, *PUBLISHED, *THE_REST, folder="published")
    short = ["--num-fid-samples", "5", "--mode", "sde", "--num-steps", "4", "--cfg-scale", "1.8",
             "--guidance-high", "0.7"]  # fmt: skip
    ours = images(tmp_path, ckpt, vae, *short, "--no-fused-attn", folder="ours")
    assert published.shape == (5, 16, 16, 3) and (published == ours).all() and published.std() > 1
    assert [path.name for path in (tmp_path / "ours").iterdir() if path.is_dir()] == [
        "0400000-euler-maruyama-4-cfg1.8-from0-to0.7-seed0"
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model SiT-B/2", "--model must be SiT-XL/2, as in the checkpoint, got SiT-B/2"),
        ("--num-classes 1000", "--num-classes must be 10, as in the checkpoint, got 1000"),
        ("--encoder-depth 8", "--encoder-depth must be 2, as in the checkpoint, got 8"),
        ("--resolution 256", "--resolution must be 16, as in the checkpoint, got 256"),
        ("--projector-embed-dims 768,1024", "--projector-embed-dims must be 6, as in the checkpoint, got 768,1024"),
        ("--path-type cosine", "--path-type must be linear, as in the checkpoint, got cosine"),
        ("--qk-norm", "--qk-norm must be left out, as the checkpoint has no query-key normalisation"),
    ],
)
def test_a_flag_that_says_what_the_checkpoint_is_not_is_refused(tmp_path, vae, capsys, flags, sentence):
    ckpt = write_ours(tmp_path / "0000000.pt", vae)
    assert sentence in refusal(capsys, tmp_path, ckpt, vae, *flags.split())


def test_a_bare_file_goes_by_the_flags(tmp_path, vae, capsys):
    ckpt = write_bare(tmp_path / "last.pt")
    flags = ("--num-steps", "4", "--num-fid-samples", "2")
    linear, cosine = (
        images(tmp_path, ckpt, vae, *flags, "--mode", "sde", "--path-type", path, folder=path)
        for path in ("linear", "cosine")
    )
    assert (linear != cosine).any()  # the score that the SDE takes from a velocity depends on the path
    (record,) = (tmp_path / "cosine").glob("*/sample.json")
    assert json.loads(record.read_text())["settings"]["path_type"] == "cosine"
    message = "its table of labels has 11 rows, which fits no model of 1000 classes"
    assert message in refusal(capsys, tmp_path, ckpt, vae, "--num-classes", "1000")


def test_repas_older_names_are_known_with_legacy_or_without(tmp_path, vae):
    new = random_weights()
    old = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in new.items()}
    assert old.keys() != new.keys()
    flags = ("--num-steps", "2", "--num-fid-samples", "2", "--encoder-depth", "2")
    wanted = images(tmp_path, write_bare(tmp_path / "new.pt"), vae, *flags, folder="new")
    for number, extra in enumerate([("--legacy",), ()]):
        path = write_bare(tmp_path / f"old{number}.pt", old)
        assert (images(tmp_path, path, vae, *flags, *extra, folder=f"old{number}") == wanted).all()


def write_sits(path, **args):
    """A file of SiT's own trainer, without the half of the head that predicts sigma."""
    weights = {name: value for name, value in random_weights().items() if not name.startswith("projectors.")}
    settings = {"path_type": "GVP", "prediction": "velocity", "loss_weight": None, "image_size": 16, "num_classes": 10}
    content = {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(**{**settings, **args})}
    torch.save(content, path)
    return path


def test_a_file_of_sits_own_trainer_is_sampled_as_sit_does(tmp_path, vae):
    """Time and sign turned round, the first three of four channels guided, and rounded."""
    images(tmp_path, write_sits(tmp_path / "0400000.pt"), vae, "--num-steps", "3", "--num-fid-samples", "2",
             "--cfg-scale", "3", "--labels", "1,2")  # fmt: skip
    (record,) = (tmp_path / "samples").glob("*/sample.json")
    recorded = json.loads(record.read_text())["settings"]
    assert (recorded["path_type"], recorded["convention"]) == ("cosine", "sit")
    sampled = read_npz(next((tmp_path / "samples").glob("*.npz")))[0]

    public = SiT(**SHAPE, **REST)
    public.load_state_dict({n: v for n, v in random_weights().items() if not n.startswith("projectors.")})
    x = initial_noise((2, 4, 4, 4), [image_generator(0, index, "noise") for index in range(2)]).double()
    labels, null = torch.tensor([1, 2]), torch.tensor([10, 10])
    with torch.no_grad():
        for step in range(3):
            s = torch.full((2,), step / 3)
            v, without = (public.eval()(x.float(), s, y).prediction.double() for y in (labels, null))
            guided = torch.cat([(without + 3 * (v - without))[:, :3], v[:, 3:]], dim=1)
            x = x + guided / 3
        decoded = VAE(LatentFormat.of(str(vae))).decode(x.float())
    wanted = torch.clamp(127.5 * decoded + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    difference = np.abs(sampled.astype(int) - wanted.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02 and sampled.std() > 1


@pytest.mark.parametrize("form", ["DiT-XL-2-256x256.pt", "000-DiT-XL-2"])
def test_a_file_of_dits_is_sampled_as_dit_does(tmp_path, vae, monkeypatch, form):
    """By DDIM's equation 12, the noise of the first three of four channels guided, and rounded."""
    monkeypatch.setitem(get_family("dit").sizes, DIT_NAME, DIT_SHAPE)
    content = public_file()
    weights = {name: value.double() for name, value in content["ema"].items()}
    write(tmp_path / "000-DiT-XL-2" / "checkpoints" / "0050000.pt", content)
    write(tmp_path / "DiT-XL-2-256x256.pt", content["ema"])
    sampled = images(tmp_path, tmp_path / form, vae, "--num-steps", "4", "--num-fid-samples", "2", "--cfg-scale", "3",
                     "--labels", "1,2")  # fmt: skip
    (record,) = (tmp_path / "samples").glob("*/sample.json")
    recorded = json.loads(record.read_text())["settings"]
    assert (recorded["mode"], recorded["convention"], recorded["timestep_spacing"]) == ("ddim", "dit", "linspace")

    alpha_bar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)  # the last one is data's
    x = initial_noise((2, 4, 4, 4), [image_generator(0, index, "noise") for index in range(2)]).double()
    for t, after in ((999, 666), (666, 333), (333, 0), (0, -1)):
        times = torch.full((2,), float(t), dtype=torch.float64)
        cond, uncond = (plain_forward(weights, x, times, torch.tensor(y), heads=2, patch=2) for y in ([1, 2], [10, 10]))
        noise = torch.cat([(uncond + 3 * (cond - uncond))[:, :3], cond[:, 3:4]], dim=1)
        clean = (x - (1 - alpha_bar[t]) ** 0.5 * noise) / alpha_bar[t] ** 0.5
        x = alpha_bar[after] ** 0.5 * clean + (1 - alpha_bar[after]) ** 0.5 * noise
    decoded = VAE(LatentFormat.of(str(vae))).decode(x.float())
    wanted = torch.clamp(127.5 * decoded + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    difference = np.abs(sampled.astype(int) - wanted.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02 and sampled.std() > 1


def test_a_bare_file_without_projectors_asks_whose_it_is(tmp_path, vae, capsys):
    weights = {name: value for name, value in random_weights().items() if not name.startswith("projectors.")}
    ckpt = write_bare(tmp_path / "bare.pt", weights)
    assert f"--convention must be given for {ckpt}" in refusal(capsys, tmp_path, ckpt, vae)
    flags = ("--num-steps", "2", "--num-fid-samples", "2", "--convention")
    ours, sits = (images(tmp_path, ckpt, vae, *flags, whose, folder=whose) for whose in ("repa", "sit"))
    assert (ours != sits).any()
    assert "--convention must be sit" in refusal(
        capsys, tmp_path, write_sits(tmp_path / "sit.pt"), vae, "--convention", "repa"
    )
