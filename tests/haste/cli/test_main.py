"""What `haste` itself answers: help in a moment and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from haste.cli.flags import sample, sweep, train
from haste.cli.main import SUBCOMMANDS, spell_out

HEAVY = ("torch", "accelerate", "diffusers", "transformers", "matplotlib", "scipy", "sklearn", "skimage", "PIL")


@pytest.mark.parametrize("command", SUBCOMMANDS)
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
        (sample, "--num-fid 5", "--num-fid-samples 5"),
        (sample, "--num_fid=5", "--num-fid-samples=5"),
        (sample, "--no-he --hel", "--no-heun --help"),
        (sample, "--cache taylor", "--cache taylor"),  # whole, though --cached-blocks begins so
        (sample, "--num 5", "--num 5"),  # two flags begin so
        (sample, "--nothing 5 -- x --", "--nothing 5 -- x --"),
        (sweep, "--cach x", "--caches x"),  # --cache is none of its own
        (train, "--rec digits", "--recipe digits"),
    ],
)
def test_flags_are_known_by_their_beginning(flags, typed, spelled):
    assert spell_out(typed.split(), flags.Args) == spelled.split()
