from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import pytest
import torch
from haste.errors import UserError
from haste.training.config import TrainConfig, preset_config
from haste.training.resume import follow_run

DIGITS = preset_config("digits")


@pytest.fixture
def record(tmp_path):
    """Write the settings of a run as a trainer leaves them; returns the flags that lead to it."""

    def write(settings, as_checkpoint=False):
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        if as_checkpoint:
            parts = {"model": {}, "ema": {}, "opt": {}, "steps": 4, "args": argparse.Namespace(**settings)}
            torch.save(parts, run / "checkpoints" / "0000004.pt")
        else:
            (run / "args.json").write_text(json.dumps(settings))
        return ["--output-dir", str(tmp_path), "--exp-name", "run"]

    return write


def test_what_is_not_typed_is_as_the_run_was_begun(record, capsys):
    flags = record({**asdict(TrainConfig()), "seed": 5, "attn_coeff": 0.25, "resume_step": 4, "exp_name": "old"})
    config = follow_run(TrainConfig(), [*flags, "--seed=5"])
    assert config == replace(TrainConfig(), seed=5, attn_coeff=0.25)
    said = capsys.readouterr().err
    assert said.startswith("as the run in ") and said.endswith("has it: --attn-coeff 0.25\n")


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_a_run_of_repa_stays_one_and_a_run_of_haste_too(record, as_checkpoint):
    public = {"seed": 3, "model": "SiT-B/2", "cfg_prob": 0.0, "report_to": "none", "vae_type": "ema"}
    config = follow_run(TrainConfig(), record(public, as_checkpoint))
    assert (config.seed, config.model, config.attn_coeff, config.early_stop_point) == (3, "SiT-B/2", 0.0, -1)
    assert config.cfg_prob == 0.1  # which is what REPA's trainer does


def test_a_run_of_haste_keeps_its_end(record):
    config = follow_run(TrainConfig(), record({"attn_coeff": 0.5, "early_stop_point": 100_000}, as_checkpoint=True))
    assert (config.attn_coeff, config.early_stop_point) == (0.5, 100_000)


def test_the_preset_of_the_run_may_be_named_again_and_another_speaks_for_itself(record):
    flags = record({**asdict(DIGITS), "attn_coeff": 0.0, "max_train_steps": 7})
    assert follow_run(DIGITS, flags) == replace(DIGITS, attn_coeff=0.0, max_train_steps=7)
    assert follow_run(TrainConfig(), flags) == replace(DIGITS, attn_coeff=0.0, max_train_steps=7, exp_name="")
    other = preset_config("repa-b-256")
    assert follow_run(other, flags) == other


@pytest.mark.parametrize("name", ["../run", "", "new"])
def test_where_no_run_is_nothing_is_followed(record, tmp_path, name):
    record({"seed": 5})
    arguments = ["--output-dir", str(tmp_path), "--exp-name", name]
    assert follow_run(TrainConfig(), arguments) == TrainConfig()


def test_what_is_told_can_be_typed(record, capsys):
    follow_run(TrainConfig(), record({"allow_tf32": True, "fused_attn": False, "vae": "my vae"}))
    assert "has it: --vae 'my vae' --no-fused-attn --allow-tf32\n" in capsys.readouterr().err


def test_a_tracker_that_is_not_here_is_left_out_and_one_that_is_typed_is_not(record, capsys, monkeypatch):
    monkeypatch.setattr("haste.training.resume.importlib.util.find_spec", lambda name: name == "tensorboard" or None)
    flags = record({"report_to": "tensorboard,wandb"})
    assert follow_run(TrainConfig(), flags).report_to == "tensorboard"
    assert "was logged to wandb, which is not installed here" in capsys.readouterr().err
    assert follow_run(TrainConfig(), [*flags, "--report-to=wandb"]).report_to == "tensorboard,wandb"
    assert "not installed" not in capsys.readouterr().err


def test_help_reads_no_run(record):
    assert follow_run(TrainConfig(), [*record({"seed": "five"}), "--help"]) == TrainConfig()


def test_settings_that_cannot_be_read_are_refused_with_their_file(record):
    with pytest.raises(UserError, match=r"seed of .*args\.json must be an integer, and is 'five'"):
        follow_run(TrainConfig(), record({"seed": "five"}))


def test_an_incomplete_command_is_left_to_the_reader_of_flags():
    assert follow_run(TrainConfig(), ["--exp-name"]) == TrainConfig()
    assert follow_run(TrainConfig(), ["--exp-name", "a", "--resume-step", "x"]) == TrainConfig()
    for flag in ("--exp-name", "--output-dir", "--resume-step"):
        assert follow_run(TrainConfig(), ["--exp-name=a", f"{flag}=--"]) == TrainConfig()
