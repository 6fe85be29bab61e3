"""Every script of examples/ runs, with settings that take seconds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMANDS = [
    "loss_in_your_trainer.py --steps 3",
    "align_your_own_model.py --steps 2",
    "cache_your_own_model.py --num-steps 10",
    "cache_a_pipeline.py --num-steps 10",
    "train_digits.py --method vanilla --steps 2 --batch-size 8",
    "sample.py exps/vanilla --num-steps 10",  # of the run that the one before has trained
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def test_every_example_is_run_here_and_is_short():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert sorted(command.split()[0] for command in COMMANDS) == [path.name for path in scripts]
    for path in scripts:
        assert len(path.read_text().splitlines()) < 60, path


@pytest.mark.parametrize("command", COMMANDS)
def test_example_runs(command, folder, monkeypatch, capsys):
    script, *arguments = command.split()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    assert capsys.readouterr().out.strip()


def test_a_missing_checkpoint_is_one_sentence(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sample.py", "nowhere"])
    with pytest.raises(SystemExit, match="^sample.py: --ckpt must be .*nowhere, which does not exist$"):
        runpy.run_path(str(EXAMPLES / "sample.py"), run_name="__main__")
