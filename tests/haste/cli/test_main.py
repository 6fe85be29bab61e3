"""What `haste` itself answers, whatever the terminal: help in a moment and without torch, its version, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from haste import __version__
from haste.cli.main import COMMANDS, main, spell_out
from haste.generation.config import SampleConfig
from haste.sweep.config import SweepConfig
from haste.training.config import TrainConfig

HEAVY = ("torch", "accelerate", "diffusers", "transformers", "matplotlib", "scipy", "sklearn", "skimage", "PIL")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_refusals_bring_nothing_that_takes_long(command):
    code = f"""
import sys
from haste.cli.main import main
for arguments in (["--help"], ["--no-such-flag"]):
    try: main(["{command}", *arguments])
    except SystemExit as exit: print("status", exit.code)
print("heavy", [name for name in {HEAVY} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"usage: haste {command}" in result.stdout and "--no-such-flag" in result.stderr
    assert "status 0\n" in result.stdout and "status 2\n" in result.stdout and "heavy []\n" in result.stdout


@pytest.mark.parametrize(
    ("flags", "typed", "spelled"),
    [
        (SampleConfig, "--num-fid 5", "--num-fid-samples 5"),
        (SampleConfig, "--num_fid=5", "--num-fid-samples=5"),
        (SampleConfig, "--no-he --hel", "--no-heun --help"),
        (SampleConfig, "--cache taylor", "--cache taylor"),  # whole, though --cached-blocks begins so
        (SampleConfig, "--num 5", "--num 5"),  # two flags begin so
        (SampleConfig, "--nothing 5 -- x --", "--nothing 5 -- x --"),
        (SweepConfig, "--cach x", "--caches x"),  # --cache is none of its own
        (TrainConfig, "--pres digits", "--preset digits"),
    ],
)
def test_flags_are_known_by_their_beginning(flags, typed, spelled):
    assert spell_out(typed.split(), flags) == spelled.split()


def haste(*arguments, **options):
    code = "from haste.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], timeout=60, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("arguments", "begin"),
    [([], "usage: haste"), (["--help"], "usage: haste"), (["--version"], f"haste {__version__}\n")],
)
def test_alone_it_explains_itself_and_its_version_is_told(capsys, arguments, begin):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0 and capsys.readouterr().out.startswith(begin)


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "3"},
        {"COLUMNS": "nonsense"},
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_help_does_not_depend_on_the_terminal(environment):
    result = haste("evaluate", "--help", stdout=subprocess.PIPE, env={**os.environ, **environment})
    assert result.returncode == 0 and result.stderr == b""
    assert b"--kid-subset-size" in result.stdout


def test_a_reader_that_leaves_ends_it_without_a_word():
    read, write = os.pipe()
    os.close(read)
    try:
        result = haste("train", "--help", stdout=write)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_told():
    with open("/dev/full", "wb") as full:
        result = haste("train", "--help", stdout=full)
    assert result.returncode == 2
    assert result.stderr.startswith(b"haste train: ") and result.stderr.endswith(b"No space left on device\n")
    assert result.stderr.count(b"\n") == 1


def test_several_processes_are_held_against_each_other_before_anything_begins(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--preset", "digits"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "haste train: WORLD_SIZE must be a whole number of at least 1, got 'two'\n"


def test_letters_that_an_encoding_lacks_are_shown_as_others():
    code = "from haste.cli.console import accept_any_text; accept_any_text(); print('Fréchet τ ± Ω')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert result.stdout == b"Frechet tau +- ?\n"
