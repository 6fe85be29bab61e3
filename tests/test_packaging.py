"""What `pip install .` says where torch is missing or too old, that it finds a torch it cannot import, and that an
editable install puts the module it has built in place whole."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from setuptools import Distribution

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture
def setup_module():
    spec = importlib.util.spec_from_file_location("haste_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site_packages(setup_module, monkeypatch, tmp_path):
    """An isolated build: nothing can be imported, the target's packages stand under purelib."""
    monkeypatch.setattr(setup_module, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_module.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


def install_torch(site_packages: Path, version: str) -> Path:
    folder = site_packages / "torch"
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def test_without_torch_one_sentence_says_what_to_do(setup_module, site_packages):
    with pytest.raises(SystemExit, match=r"found none: run `pip install torch`, then install haste\."):
        setup_module.find_torch()


def test_an_old_torch_is_named(setup_module, site_packages):
    install_torch(site_packages, "2.9.1+cu128")
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.11 and found 2\.9\.1\+cu128"):
        setup_module.find_torch()


def test_an_isolated_build_finds_the_torch_of_its_target(setup_module, site_packages):
    folder = install_torch(site_packages, "2.11.0")
    assert setup_module.find_torch() == (folder, "2.11.0")


def test_a_built_module_replaces_the_old_one_at_once(setup_module, monkeypatch, tmp_path):
    """When the name changes hands the new file is complete, and who has the old one open keeps it."""
    built, module = tmp_path / "built.so", tmp_path / "module.so"
    built.write_bytes(b"new")
    module.write_bytes(b"old")
    built.chmod(0o755)
    contents = []

    def replace(source, target, rename=os.replace):
        contents.append((Path(source).read_bytes(), Path(target).read_bytes()))
        rename(source, target)

    monkeypatch.setattr(setup_module.os, "replace", replace)
    with open(module, "rb") as loaded:
        setup_module.CMakeBuild(Distribution()).copy_file(str(built), str(module), level=1)
        assert loaded.read() == b"old"
    assert contents == [(b"new", b"old")]
    assert module.read_bytes() == b"new" and os.access(module, os.X_OK)
    assert sorted(tmp_path.iterdir()) == [built, module]
