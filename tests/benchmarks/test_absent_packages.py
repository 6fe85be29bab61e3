"""What runs on a borrowed GPU needs torch, transformers and accelerate, and what these bring along; nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = "tyro diffusers scipy sklearn skimage matplotlib datasets PIL pandas torchvision timm"


def run(*command: str, absent: str = ABSENT) -> subprocess.CompletedProcess:
    folders = [ROOT / "tests/support/absent_packages", ROOT, ROOT / "python"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "ABSENT_PACKAGES": absent}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_packages_are_absent():
    code = "import importlib.util as u, sys; print([p for p in sys.argv[1:] if u.find_spec(p)])"
    assert run("-c", code, *ABSENT.split(), "torch").stdout.strip() == "['torch']"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_step", ("--resolution", "64")),
        ("sampling", ("--num-steps", "8", "--interval", "2", "--order", "2", "--batch-size", "2")),
    ],
)
def test_a_benchmark_measures_and_leaves_the_plot_to_another_machine(script, flags, tmp_path):
    path = f"benchmarks/{script}/run.py"
    result = run(
        path, "--model", "tiny", "--rounds", "1", *flags, "--output", str(tmp_path), absent=ABSENT + " hypothesis"
    )
    assert result.returncode == 0, result.stderr
    assert "no results.png, as matplotlib is not installed here" in result.stdout
    (measured,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert measured["case"]["model"] == "tiny" and not [row for row in measured["rows"] if "absent" in row]
    assert (tmp_path / "results.md").exists() and not (tmp_path / "results.png").exists()


def test_the_caches_tests_are_found_without_them():
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/haste/caching")
    assert result.returncode == 0, result.stdout
