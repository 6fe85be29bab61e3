"""The import of haste_ext: with torch alone, from a source folder in which nothing is built, and refused."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import haste_ext
from haste_ext import _load

# One folder, or a clone and the installed package.
PACKAGE, BUILT = Path(haste_ext.__file__).parent, Path(_load._C.__file__).parent
SUPPORT = Path(__file__).parents[1] / "support"
# What `pip install torch` brings, and the standard packages of a venv.
OF_TORCH = {"torch", "functorch", "torchgen", "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
            "markupsafe", "fsspec", "setuptools", "_distutils_hack", "pip", "triton", "nvidia", "isympy"}  # fmt: skip


def run(code: str, *path: Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def source_folder(tmp_path):
    """A clone in which nothing is built."""
    shutil.copytree(PACKAGE, tmp_path / "clone/haste_ext", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return tmp_path / "clone"


def test_the_operations_need_torch_alone():
    others = set(importlib.metadata.packages_distributions()) - OF_TORCH
    assert {"numpy", "diffusers", "tyro"} <= others
    code = """
import sys, torch, haste_ext, haste_ext.reference
features = torch.rand(2, 3, 4, requires_grad=True)
haste_ext.token_cosine_loss(features, torch.rand(2, 3, 4)).backward()
assert features.grad.abs().sum() > 0 and "numpy" not in sys.modules and "haste" not in sys.modules
"""
    absent = " ".join((others | {"haste"}) - {"haste_ext"})
    result = run(code, SUPPORT / "absent_packages", PACKAGE.parent, BUILT.parent, ABSENT_PACKAGES=absent)
    assert result.returncode == 0, result.stderr


def test_a_source_folder_in_which_nothing_is_built_uses_the_installed_module(source_folder):
    code = "import haste_ext; from haste_ext import _C; print(haste_ext.__file__); print(_C.__file__)"
    result = run(code, BUILT.parent, cwd=source_folder)  # "" comes first on the path, as for `python -m`
    assert result.returncode == 0, result.stderr
    package, module = result.stdout.split()
    assert Path(package).parent == source_folder / "haste_ext" and Path(module).parent == BUILT


def test_without_a_compiled_module_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "HERE", tmp_path)
    monkeypatch.setattr(_load.sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match=rf"haste_ext in {tmp_path} holds no module .*`pip install \.`") as error:
        _load.folder_of_module()
    assert error.value.name == "haste_ext._C"  # by which `haste` knows it


@pytest.mark.parametrize("variable", ["HASTE_CPU_CAPABILITY", "HASTE_CUDA_KERNELS"])
def test_a_set_of_kernels_that_this_build_lacks_is_refused_at_once(monkeypatch, variable):
    monkeypatch.setattr(_load._C, "cuda_kernels", lambda: ["portable", "hopper"])
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(ImportError, match=rf"{variable} must be one of portable, .*, got 'nonsense'"):
        _load.check_environment()
    monkeypatch.setenv(variable, "portable")
    _load.check_environment()
    monkeypatch.setenv(variable, "")
    _load.check_environment()


def test_a_build_of_an_older_source_is_said_to_be_one(monkeypatch):
    monkeypatch.delattr(_load._C, "cpu_capabilities")
    with pytest.raises(ImportError, match="is of an older source than") as error:
        _load.check_environment()
    assert error.value.name == "haste_ext._C"
