"""What `haste` itself answers, whatever the terminal: help in a moment and without torch, its version, closed pipes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import fields

import pytest
from haste import __version__
from haste.cli.main import COMMANDS, flag_hints, main, read_flags, spell_out
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
    assert spell_out(typed.split(), flag_hints(flags)) == spelled.split()


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("trian", "haste: unknown command trian; did you mean train?"),
        ("xyz", "haste: unknown command xyz; the commands are prepare, train, "),
        ("--foo", "haste: unknown flag --foo; the commands are prepare, train, "),
        ("--verison", "haste: unknown flag --verison; did you mean --version?"),
        ("sample --seed 5", "haste sample: unknown flag --seed; did you mean --global-seed?"),
        ("train --batchsize 3", "haste train: unknown flag --batchsize; did you mean --batch-size?"),
        ("train --heun", "haste train: unknown flag --heun; `haste train --help` lists all flags"),
        ("sample --num 5", "haste sample: unknown flag --num; did you mean --num-classes, --num-steps or --num-"),
        ("train digits", "haste train: unknown argument digits; `haste train --help` lists all flags"),
        ("train --batch-size many", "haste train: --batch-size must be an integer, got many"),
        ("train --batch-size 0.5", "haste train: --batch-size must be an integer, got 0.5"),
        ("train --batch-size", "haste train: --batch-size must be an integer, got nothing"),
        ("train --depth many", "haste train: --depth must be an integer or None, got many"),
        ("train --on-bad-file x", "haste train: --on-bad-file must be refuse or skip, got x"),
        ("train --qk-norm=yes", "haste train: --qk-norm must be given without a value, got yes"),
        ("sample --ckpt", "haste sample: --ckpt must be a path, got nothing"),
        ("sample", "haste sample: --ckpt must be a path, got nothing; it is required"),
        ("sample --ckpt a --cfg-scale -x", "haste sample: --cfg-scale must be a number, got nothing"),
        ("sweep --ckpt a --intervals 3 x", "haste sweep: --intervals must be an integer, got x"),
        (
            "sweep --ckpt a --caches=x",
            "haste sweep: --caches must be reuse, taylor, newton, hermite or delta-dit, got x",
        ),
    ],
)
def test_wrong_flags_and_values_are_refused_in_one_sentence(capsys, typed, sentence):
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    output = capsys.readouterr()
    assert exit_.value.code == 2 and output.out == ""
    assert output.err.startswith(sentence) and output.err.count("\n") == 1


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "report"])
def test_every_flag_is_read_with_its_own_default(command):
    """So that what is checked before tyro parses agrees with it."""
    home, _, name = COMMANDS[command][1].partition(":")
    config_class = getattr(importlib.import_module(home), name)
    needed = {
        "prepare": ["--source", "a", "--dest", "b"],
        "train": ["--exp-name", "a", "--data-dir", "b"],
        "evaluate": ["--samples", "."],
        "export": ["--ckpt", "a", "--to", "b"],
        "demo": [],
    }.get(command, ["--ckpt", "a"])
    wanted = read_flags(command, needed)
    words = []
    for field in fields(config_class):
        value = getattr(wanted, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if field.name not in flag_hints(config_class) or value in ("", ()) or flag in needed or flag == "--config":
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    assert words and read_flags(command, [*needed, *words]) == wanted


def test_completion_for_a_shell_is_tyros(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--tyro-print-completion", "bash"])
    assert not exit_.value.code and "--batch-size" in capsys.readouterr().out


def test_help_is_wrapped_to_the_terminal_and_names_a_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 90
    assert "Every combination of the lists is sampled from one checkpoint, evaluated and timed; the\n" in out
    text = " ".join(out.replace("│", " ").split())
    assert "[default: digits, for digits] --reference" in text and "(default: )" not in text


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
