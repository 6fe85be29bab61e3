"""Training on latents of autoencoders without a posterior: encoded on the way or prepared, resumed, and sampled."""

from __future__ import annotations

import pytest
import torch
from haste.cli.main import main
from haste.errors import UserError
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.trainer import train
from image_files import save_dc, save_rae, write_classes
from PIL import Image

VANILLA = {"enc_type": "None", "resolution": 16, "num_workers": 0, "checkpointing_steps": 2, "sampling_steps": 0}
SAMPLING = ["--num-steps", "2", "--num-fid-samples", "3", "--labels", "balanced"]


@pytest.mark.parametrize(
    ("save", "channels"), [(lambda folder: save_dc(folder), 4), (lambda x: save_rae(x, grid=4), 64)]
)
def test_a_run_on_its_latents_resumes_bit_for_bit_and_is_sampled(make_config, tmp_path, save, channels):
    classes, vae = write_classes(tmp_path / "classes"), save(tmp_path / "vae")

    def run(name, steps):
        config = make_config(exp_name=name, data_dir=str(classes), vae=str(vae), max_train_steps=steps, **VANILLA)
        return read_checkpoint(checkpoint_path(train(config).folder / "checkpoints", steps))

    unbroken, _, resumed = run("unbroken", 4), run("broken", 2), run("broken", 4)
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], value) for name, value in unbroken[part].items())
    latents = unbroken["latents"]
    assert (latents["vae"], latents["channels"], latents["factor"]) == (str(vae), channels, 4)
    main(["sample", "--ckpt", str(tmp_path / "unbroken"), *SAMPLING, "--sample-dir", str(tmp_path / "out")])
    assert Image.open(next((tmp_path / "out").rglob("000001.png"))).size == (16, 16)


def test_prepared_latents_and_their_statistics(make_config, tmp_path):
    classes, vae, data = write_classes(tmp_path / "classes"), save_rae(tmp_path / "vae", grid=4), tmp_path / "data"
    main(["prepare", "--source", str(classes), "--dest", str(data), "--vae", str(vae), "--resolution", "16",
          "--num-workers", "0"])  # fmt: skip
    stats = str(data / "latents_stats.pt")
    result = train(make_config(data_dir=str(data), vae_stats=stats, max_train_steps=2, **VANILLA))
    latents = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 2))["latents"]
    assert latents["scale"] == pytest.approx((1 / torch.load(stats, weights_only=True)["std"]).flatten().tolist())
    main(["sample", "--ckpt", str(result.folder), *SAMPLING, "--sample-dir", str(tmp_path / "out")])
    assert Image.open(next((tmp_path / "out").rglob("000001.png"))).size == (16, 16)
    with pytest.raises(UserError, match="--resolution must be 16, the only one of the VAE"):
        train(make_config(exp_name="big", data_dir=str(classes), vae=str(vae), **{**VANILLA, "resolution": 32}))
