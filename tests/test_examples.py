"""Every script of examples/ runs, with settings that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "loss_in_your_trainer.py": ("--steps", "5"),
    "align_your_own_model.py": ("--steps", "2"),
    "cache_your_own_model.py": ("--num-steps", "12"),
}


def test_every_example_is_run_here():
    assert sorted(EXAMPLES) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES)
def test_example_runs(script, tmp_path):
    source = ROOT / "examples" / script
    assert len(source.read_text().splitlines()) < 60
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(source), *EXAMPLES[script]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
