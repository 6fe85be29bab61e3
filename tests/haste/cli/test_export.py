"""`haste export`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict

import haste
import pytest
from digits_run import write_run
from haste.cli.main import main
from haste.vae import LatentFormat
from image_files import save_dc, save_rae, save_vae
from latent_dit import save_unshifted_vae, write_dit
from latent_student import write_ours


def refusal(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["export", *map(str, arguments)])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste export:")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture
def checkpoint(tmp_path):
    return write_dit(tmp_path / "run")


def test_a_pipeline_and_the_same_command_again(checkpoint, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "new" / "pipeline"
    flags = ["export", "--ckpt", str(checkpoint), "--to", str(folder)]
    main(flags)
    assert capsys.readouterr().out.strip() == str(folder) and "at most" in caplog.text
    files = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in files} == {
        "haste.json", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "transformer/haste_times.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pipeline"]  # nothing is left over
    main(flags)
    assert "already" in caplog.text
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_folder_of_something_else_is_refused(checkpoint, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    main(["export", "--ckpt", str(checkpoint), "--to", str(folder)])
    assert "which holds a pipeline with ema True, not False" in refusal(
        capsys, "--ckpt", checkpoint, "--to", folder, "--no-ema"
    )
    (folder / "haste.json").unlink()
    assert "--to must be a new folder" in refusal(capsys, "--ckpt", checkpoint, "--to", folder)
    assert "--to must be another folder" in refusal(capsys, "--ckpt", folder, "--to", folder)


def test_a_killed_export_leaves_no_folder(checkpoint, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("haste.generation.export._write_scheduler", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["export", "--ckpt", str(checkpoint), "--to", str(tmp_path / "pipeline")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_transformer_alone(checkpoint, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    main(["export", "--ckpt", str(checkpoint), "--to", str(folder), "--vae", "none", "--no-fit-times"])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert names == ["haste.json", "scheduler/scheduler_config.json", "transformer/config.json",
                     "transformer/diffusion_pytorch_model.safetensors"]  # fmt: skip
    found = haste.load_checkpoint(folder, device="cpu")
    assert found.run == folder and found.checkpoint.parent == folder / "transformer"


def test_a_full_disk_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert "the transformer takes" in refusal(capsys, "--ckpt", checkpoint, "--to", tmp_path / "pipeline")


# ---- models that have no pipeline ----


def test_a_sit(tmp_path, capsys):
    path = write_ours(tmp_path / "0000100.pt", tmp_path / "vae")
    assert "--ckpt must be a DiT, for which diffusers has a pipeline, got a SiT" in refusal(
        capsys, "--ckpt", path, "--to", tmp_path / "pipeline"
    )
    assert "got a SiT" in refusal(capsys, "--ckpt", write_run(tmp_path), "--to", tmp_path / "pipeline")


def test_a_model_of_pixels(tmp_path, capsys):
    path = write_dit(tmp_path, latents={}, in_channels=1)
    assert "--vae must be none, for the transformer alone" in refusal(capsys, "--ckpt", path, "--to", tmp_path / "new")
    main(["export", "--ckpt", str(path), "--to", str(tmp_path / "new"), "--vae", "none"])
    assert json.loads((tmp_path / "new/transformer/config.json").read_text())["in_channels"] == 1


@pytest.mark.parametrize("changes", [{"shift": (0.5,) * 4}, {"scale": (0.5, 0.5, 0.5, 0.25)}])
def test_latents_that_no_pipeline_scales(tmp_path, capsys, changes):
    latents = asdict(LatentFormat.of(str(save_unshifted_vae(tmp_path / "vae"))))
    path = write_dit(tmp_path, latents={**latents, **changes})
    assert "--vae must have latents of one scale and no shift" in refusal(
        capsys, "--ckpt", path, "--to", tmp_path / "new"
    )


def test_a_deep_compression_autoencoder_is_the_pipelines(tmp_path):
    from diffusers import AutoencoderDC, DiTPipeline

    latents = asdict(LatentFormat.of(str(save_dc(tmp_path / "run" / "vae"))))
    path, folder = write_dit(tmp_path / "run", latents=latents), tmp_path / "pipeline"
    main(["export", "--ckpt", str(path), "--to", str(folder)])
    assert isinstance(DiTPipeline.from_pretrained(folder).vae, AutoencoderDC)
    flags = ["--num-steps", "2", "--num-fid-samples", "2", "--labels", "2,0"]
    for source in (folder, path):
        main(["sample", "--ckpt", str(source), *flags, "--sample-dir", str(tmp_path / source.name)])
    made = [next((tmp_path / source.name).rglob("000001.png")).read_bytes() for source in (folder, path)]
    assert made[0] == made[1]


def test_an_rae_is_no_pipelines(tmp_path, capsys):
    latents = asdict(LatentFormat.of(str(save_rae(tmp_path / "run" / "vae", grid=4))))
    path = write_dit(tmp_path / "run", latents=latents, in_channels=64)
    assert "--vae must be none, for the transformer alone, or an AutoencoderKL or AutoencoderDC" in refusal(
        capsys, "--ckpt", path, "--to", tmp_path / "pipeline"
    )


def test_a_vae_that_is_not_there(checkpoint, tmp_path, capsys):
    shutil.rmtree(checkpoint.parent / "vae")
    sentence = refusal(capsys, "--ckpt", checkpoint, "--to", tmp_path / "new")
    assert sentence.startswith("haste export: --vae must be a folder") and sentence.endswith("does not exist")
    shifted = save_vae(tmp_path / "other")
    assert "--vae must have 4 channels and 2 pixels" in refusal(
        capsys, "--ckpt", checkpoint, "--to", tmp_path / "new", "--vae", shifted
    )


# ---- every command takes the folder ----


def test_sample_takes_the_folder(checkpoint, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    main(["export", "--ckpt", str(checkpoint), "--to", str(folder)])
    flags = ["--num-steps", "2", "--num-fid-samples", "3", "--labels", "2,0"]
    for source in (folder, checkpoint):
        main(["sample", "--ckpt", str(source), *flags, "--sample-dir", str(tmp_path / source.name)])
    made = [next((tmp_path / source.name).rglob("000001.png")).read_bytes() for source in (folder, checkpoint)]
    assert made[0] == made[1]
