"""Nothing is lost: runs that were stopped, killed, cut short or starved of disk go on as if nothing had happened."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from haste import transport
from haste.data import Loader
from haste.errors import UserError
from haste.training import run_dir, samples
from haste.training.checkpoint import checkpoint_path, initial_checkpoint, read_checkpoint, read_newest_checkpoint
from haste.training.config import TrainConfig
from haste.training.run_dir import RunDir
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from image_files import save_vae, write_classes, write_mar_cache
from small_models import save_teacher
from training_runs import assert_same_bits, final_state, read_log


@pytest.fixture
def unbroken(make_config):
    return final_state(train(make_config(exp_name="unbroken")))


@pytest.mark.parametrize("stop", [3, 6, 9])  # before τ, at τ, after τ
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(make_config, unbroken, stop):
    first = train(make_config(max_train_steps=stop))
    assert first.step == stop
    torch.manual_seed(999)
    result = train(make_config())
    assert_same_bits(final_state(result), unbroken)
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))


def test_a_resumed_run_writes_the_bytes_of_an_unbroken_one(make_config):
    def anew(config):  # strings of their own, as those of a command line or a file
        return TrainConfig(**json.loads(json.dumps(asdict(config))))

    checkpoint = train(make_config()).folder / "checkpoints" / "0000012.pt"
    unbroken = checkpoint.read_bytes()
    shutil.rmtree(checkpoint.parent.parent)
    train(anew(make_config(max_train_steps=6)))
    train(anew(make_config()))
    assert checkpoint.read_bytes() == unbroken


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_going_on_from_an_earlier_step_begins_a_branch(make_config, unbroken):
    train(make_config())
    result = train(make_config(resume_step=4, checkpoints_total_limit=1, max_train_steps=8))  # stopped half way
    assert names(result.folder) == ["0000008.pt"]
    assert names(result.folder / "branches" / "1-from-0000004") == ["0000008.pt", "0000012.pt"]
    result = train(make_config(resume_step=4))
    assert_same_bits(final_state(result), unbroken)
    assert names(result.folder) == ["0000008.pt", "0000012.pt"]
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))


def test_a_run_that_is_being_trained_is_refused(make_config):
    config = make_config()
    with RunDir(config).hold(), pytest.raises(UserError, match="--exp-name run is being trained .* by .*process"):
        train(config)
    assert not RunDir(config).path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(make_config, unbroken, monkeypatch, number):
    original = Loader.next

    def interrupted(self, step, pass_number):
        if step == 4:
            os.kill(os.getpid(), number)
        return original(self, step, pass_number)

    monkeypatch.setattr(Loader, "next", interrupted)
    result = train(make_config(checkpointing_steps=100))
    assert result.interrupted == number and result.step == 5
    monkeypatch.setattr(Loader, "next", original)
    assert_same_bits(final_state(train(make_config(checkpointing_steps=100))), unbroken)


def test_a_newest_checkpoint_that_is_cut_short_costs_only_its_steps(make_config, unbroken, caplog):
    result = train(make_config())
    newest = checkpoint_path(result.folder / "checkpoints", 12)
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert_same_bits(final_state(train(make_config())), unbroken)
    assert "is not a valid checkpoint" in caplog.text


def test_a_finished_run_is_not_trained_again(make_config):
    result = train(make_config())
    before = (result.folder / "log.jsonl").read_text()
    assert train(make_config()).step == 12
    assert (result.folder / "log.jsonl").read_text() == before


def test_a_checkpoint_of_another_run_is_refused(make_config):
    other = train(make_config(exp_name="other", seed=1, max_train_steps=4))
    folder = RunDir(make_config())
    folder.create(0)
    (other.folder / "checkpoints" / "0000004.pt").rename(folder.checkpoints / "0000004.pt")
    with pytest.raises(UserError, match=r"a run with --seed 1, not 0"):
        train(make_config())


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(make_config):
    path = checkpoint_path(train(make_config(max_train_steps=4)).folder / "checkpoints", 4)
    checkpoint = read_checkpoint(path)
    checkpoint["model"]["pos_embed"] = torch.zeros(1, 9, 16)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="pos_embed of model of .*0000004.pt must have the shape"):
        train(make_config())


# ---- checkpoints of other trainers ----


def as_repa_writes(path, **settings):
    """Takes out of a checkpoint what REPA's trainer does not know."""
    checkpoint = read_checkpoint(path)
    args = argparse.Namespace(seed=0, encoder_depth=2, report_to="wandb", sampling_steps=10_000, **settings)
    public = {name: checkpoint[name] for name in ("model", "ema", "opt", "steps")}
    torch.save({**public, "args": args}, path)
    return public


@pytest.mark.parametrize("step", [4, 8])  # aligned, and after τ
def test_going_on_from_a_public_checkpoint(make_config, step):
    path = checkpoint_path(train(make_config(max_train_steps=step)).folder / "checkpoints", step)
    public = as_repa_writes(path, max_train_steps=400_000)
    (path.parent.parent / "args.json").write_text('{"seed": 0, "report_to": "wandb"}')
    config = make_config()
    checkpoint = read_newest_checkpoint(path.parent)
    trainer = Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config), checkpoint)
    assert trainer.step == step and (trainer.aligner is None) == (step == 8)
    loaded = trainer.state.state_dict()
    for part in ("model", "ema"):
        assert_same_bits(loaded[part], dict(public[part]))
    assert_same_bits(loaded["opt"]["state"], public["opt"]["state"])
    result = trainer.run()
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))


def test_a_new_run_may_begin_with_the_weights_of_another(make_config):
    other = train(make_config(exp_name="other", ema_decay=0.5))
    path = checkpoint_path(other.folder / "checkpoints", 12)
    config = make_config(init_from=str(path), seed=3)
    trainer = Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config))
    assert trainer.step == 0
    begun, given = trainer.state.state_dict(), read_checkpoint(path)
    for part in ("model", "ema"):
        for name, value in given[part].items():
            assert torch.equal(begun[part][name], value) != name.startswith("projectors."), name
    assert begun["opt"]["state"] == {}


def test_init_from_takes_the_folder_of_a_run(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="--init-from must be a checkpoint or the folder of a run, .* does not exist"):
        initial_checkpoint(run)
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="--init-from must be .*, which holds no checkpoints"):
        initial_checkpoint(run)
    for step in (4, 12):
        checkpoint_path(run / "checkpoints", step).touch()
    newest = checkpoint_path(run / "checkpoints", 12)
    assert initial_checkpoint(run) == initial_checkpoint(newest) == newest


def test_weights_of_another_size_are_refused(make_config):
    path = checkpoint_path(train(make_config(exp_name="other", max_train_steps=1)).folder / "checkpoints", 1)
    with pytest.raises(UserError, match=r"does not fit SiT-Digits/2: .*: blocks\.3\.attn\.qkv\.weight is missing"):
        train(make_config(init_from=str(path), model="SiT-Digits/2"))


# ---- what goes wrong ----


@pytest.fixture
def nan_at_step_seven(monkeypatch):
    original, seen = transport.velocity_loss, []

    def breaks(*args):
        seen.append(1)
        return original(*args) * (float("nan") if len(seen) == 7 else 1.0)

    monkeypatch.setattr(transport, "velocity_loss", breaks)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_spares_the_checkpoint(make_config, nan_at_step_seven):
    config = make_config(logging_steps=100)
    with pytest.raises(UserError, match="not finite at step 7 "):
        train(config)
    folder = RunDir(config).checkpoints
    assert [path.name for path in folder.iterdir()] == ["0000004.pt"]
    weights = read_checkpoint(folder / "0000004.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_step_that_is_not_finite_may_be_left_out(make_config, nan_at_step_seven, caplog):
    config = make_config(on_nan="skip", logging_steps=4, checkpointing_steps=1)
    with caplog.at_level(logging.WARNING):
        result = train(config)
    assert result.step == 12 and "not finite at step 7 " in caplog.text and "skipped step 7" in caplog.text
    before, skipped, after = (
        read_checkpoint(checkpoint_path(result.folder / "checkpoints", step)) for step in (6, 7, 8)
    )
    for name, weight in before["model"].items():
        assert torch.equal(weight, skipped["model"][name])
    assert before["opt"]["state"][1]["step"] == skipped["opt"]["state"][1]["step"] == 6
    assert after["opt"]["state"][1]["step"] == 7
    log = read_log(result.folder)
    assert sum(line["skipped_steps"] for line in log) == 1
    assert all(line["loss"] is None or line["loss"] < 10 for line in log)


def test_when_no_step_is_finite_skipping_ends(make_config, monkeypatch):
    original = transport.velocity_loss
    monkeypatch.setattr(transport, "velocity_loss", lambda *args: original(*args) * float("inf"))
    with pytest.raises(UserError, match="not finite at step 1 .* nor at any of the 4 steps"):
        train(make_config(on_nan="skip", logging_steps=4))


def test_only_the_newest_checkpoints_are_kept(make_config):
    folder = train(make_config(checkpointing_steps=2, checkpoints_total_limit=2)).folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["0000010.pt", "0000012.pt"]


def test_a_full_disk_is_reported_before_the_first_step(make_config, monkeypatch):
    monkeypatch.setattr("haste.io.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"cannot be used: .*checkpoints has .* free, and a checkpoint takes"):
        train(make_config())


def test_a_disk_that_is_full_for_a_while_costs_no_steps_and_no_older_checkpoint(make_config, monkeypatch, caplog):
    free = iter([10**12, 10**12, 0, 10**12, 10**12, 10**12])
    monkeypatch.setattr("haste.io.shutil.disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with caplog.at_level(logging.ERROR):
        config = make_config(logging_steps=2, checkpoints_total_limit=1, checkpointing_steps=3, max_train_steps=8)
        folder = train(config).folder
    assert "0000006.pt could not be written, and training goes on: " in caplog.text
    # 3 written; 6 failed, and 3 was not deleted; 8, the next line of the log, is also the last step
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000008.pt"]


def test_a_disk_that_stays_full_spares_what_is_there(make_config, monkeypatch):
    free = iter([10**12, 10**12, 0, 0])
    monkeypatch.setattr("haste.io.shutil.disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    config = make_config(checkpoints_total_limit=1, max_train_steps=12, checkpointing_steps=4, logging_steps=100)
    with pytest.raises(UserError, match=r"0000012.pt could not be written: .*checkpoints has .* free"):
        train(config)
    assert [path.name for path in RunDir(config).checkpoints.iterdir()] == ["0000004.pt"]


def test_a_log_and_samples_that_cannot_be_written_cost_no_training(make_config, unbroken, monkeypatch, caplog):
    """Between steps 4 and 9 the disk takes nothing but checkpoints."""
    steps = []

    def full_for_a_while(original):
        def write(path, *args, **kwargs):
            steps.append(path)
            if 4 < len([step for step in steps if step.suffix == ".jsonl"]) < 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, *args, **kwargs)

        return write

    monkeypatch.setattr(run_dir, "append_line", full_for_a_while(run_dir.append_line))
    monkeypatch.setattr(samples, "write_image", full_for_a_while(samples.write_image))
    with caplog.at_level(logging.WARNING):
        result = train(make_config(sampling_steps=6))
    assert_same_bits(final_state(result), unbroken)
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))
    assert [path.name for path in sorted((result.folder / "samples").iterdir())] == ["0000006.png", "0000012.png"]
    assert caplog.text.count("log.jsonl cannot be written, and training goes on") == 1
    assert caplog.text.count("samples cannot be written, and training goes on") == 1


def test_other_data_than_the_run_began_with_is_refused(make_config):
    path = checkpoint_path(train(make_config(max_train_steps=4)).folder / "checkpoints", 4)
    checkpoint = read_checkpoint(path)
    torch.save({**checkpoint, "data": {"images": 5}}, path)
    with pytest.raises(UserError, match="--data-dir must be the data .* got digits, .*: 1797 images, which were 5;"):
        train(make_config())


def test_the_plateau_rule_probes_ends_alignment_and_survives_a_resume(make_config, unbroken):
    rule = {"termination": "plateau", "probe_start": 2, "probe_every": 2, "probe_images": 4, "plateau_patience": 1,
            "plateau_min_delta": 10.0, "early_stop_point": -1}  # fmt: skip
    log = read_log(train(make_config(exp_name="whole", **rule)).folder)
    assert [line["aligned"] for line in log] == [True] * 4 + [False] * 8  # the second probe is at step 4
    train(make_config(exp_name="broken", max_train_steps=3, **rule))
    resumed = train(make_config(exp_name="broken", **rule))
    for a, b in zip(read_log(resumed.folder), log, strict=True):
        assert (a["loss"], a["aligned"]) == (b["loss"], b["aligned"])
    # A probe draws nothing of the run's: until it ends alignment, the run is the one without it.
    assert torch.equal(final_state(resumed)["rng"]["torch"], unbroken["rng"]["torch"])


# ---- latents made on the way ----


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Twelve photographs in three classes, and a VAE that makes 4 x 4 latents of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("images")
    return write_classes(folder / "classes"), save_vae(folder / "vae")


@pytest.fixture(scope="module")
def colour_teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), patch_size=4, num_channels=3)


@pytest.mark.parametrize(("stop", "cached"), [(4, False), (8, False), (4, True)])
def test_a_run_on_latents_resumes_bit_for_bit(make_config, image_folder, colour_teacher, tmp_path, stop, cached):
    """Latents made on the way, or MAR's cached ones, of which either the image's or its mirror image's are taken."""
    classes, vae = image_folder
    data = {"data_dir": str(classes)}
    if cached:
        cache = write_mar_cache(tmp_path / "cache", classes, (8, 4, 4))
        data = {"data_dir": str(cache), "image_dir": str(classes)}

    def run(name, steps):
        config = make_config(
            exp_name=name, max_train_steps=steps, vae=str(vae), resolution=16, enc_type=str(colour_teacher),
            num_workers=1, **data,
        )  # fmt: skip
        return read_checkpoint(checkpoint_path(train(config).folder / "checkpoints", steps))

    unbroken = run("unbroken", 12)
    run("broken", stop)
    resumed = run("broken", 12)
    assert unbroken["model_config"]["in_channels"] == 4 and unbroken["model_config"]["num_classes"] == 3
    assert unbroken["latents"]["scale"] == (0.5,) * 4
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], value) for name, value in unbroken[part].items())


@pytest.mark.parametrize("teacher", [None, "None"])
def test_a_run_without_a_teacher_resumes_bit_for_bit(make_config, teacher):
    def run(name, steps):
        result = train(make_config(exp_name=name, enc_type=teacher, max_train_steps=steps))
        return read_checkpoint(checkpoint_path(result.folder / "checkpoints", steps))

    unbroken, _, resumed = run("unbroken", 8), run("broken", 4), run("broken", 8)
    assert all(torch.equal(resumed["ema"][name], value) for name, value in unbroken["ema"].items())
    assert not any(name.startswith("projectors.") for name in resumed["model"])


def test_cached_latents_need_images_for_a_teacher_only(make_config, image_folder, tmp_path):
    classes, vae = image_folder
    cache = write_mar_cache(tmp_path / "cache", classes, (8, 4, 4))
    settings = {"data_dir": str(cache), "vae": str(vae), "resolution": 16, "num_workers": 0, "max_train_steps": 2}
    with pytest.raises(UserError, match="--image-dir must be the images .*--enc-type, got none"):
        train(make_config(**settings))
    assert train(make_config(**settings, attn_coeff=0.0, proj_coeff=0.0, exp_name="vanilla")).step == 2
