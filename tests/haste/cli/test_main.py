"""What `haste` itself answers: help in a moment and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from haste.cli.main import SUBCOMMANDS

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
