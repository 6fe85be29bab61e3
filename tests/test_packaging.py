"""What `pip install .` says where torch is missing or too old, that it finds a torch it cannot import, that it builds
again in a folder that has been built in, what a source distribution holds, and that an editable install puts the module
it has built in place whole."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup.py"


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


@pytest.mark.parametrize("given", ["nonsense", "0", "-1", "1.5"])
def test_a_number_of_jobs_that_is_none_is_refused(setup_module, monkeypatch, given):
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a whole number of at least 1, got '{given}'"):
        setup_module.parallel_jobs()


def test_jobs_are_as_many_as_asked_for_or_as_processors(setup_module, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_module.parallel_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert setup_module.parallel_jobs() == os.cpu_count()


# ---- building a second time ----

CACHE = """\
# This is the CMakeCache file.
//Program used to build from build.ninja files.
CMAKE_MAKE_PROGRAM:FILEPATH={make}
CMAKE_CXX_COMPILER:FILEPATH={compiler}
CMAKE_TAPI:FILEPATH=CMAKE_TAPI-NOTFOUND
CMAKE_HOME_DIRECTORY:INTERNAL={home}
CMAKE_CACHEFILE_DIR:INTERNAL={folder}
CMAKE_GENERATOR:INTERNAL={generator}
"""


@pytest.fixture
def built(setup_module, tmp_path):
    """Makes a build folder as an earlier build has left it."""

    def build(**changes: str) -> Path:
        known = {"make": "/gone/overlay/bin/ninja", "compiler": sys.executable, "home": setup_module.ROOT,
                 "folder": tmp_path, "generator": "Ninja", **changes}  # fmt: skip
        (tmp_path / "CMakeCache.txt").write_text(CACHE.format(**known))
        for folder in ("CMakeFiles", "csrc"):
            (tmp_path / folder).mkdir()
        return tmp_path

    return build


def test_a_second_build_names_its_own_ninja_and_keeps_the_rest(setup_module, built):
    folder = built()
    assert setup_module.generator(folder, "/new/ninja") == ["-G", "Ninja", "-DCMAKE_MAKE_PROGRAM=/new/ninja"]
    assert (folder / "CMakeCache.txt").exists() and (folder / "CMakeFiles").exists()


@pytest.mark.parametrize(
    "changes",
    [{"compiler": "/gone/g++"}, {"home": "/old"}, {"folder": "/old/build"}, {"generator": "Unix Makefiles"}],
    ids=str,
)
def test_what_cmake_remembers_of_another_place_is_dropped_and_objects_are_kept(setup_module, built, changes):
    folder = built(**changes)
    setup_module.generator(folder, "/new/ninja")
    assert [path.name for path in folder.iterdir()] == ["csrc"]


def test_without_ninja_make_builds(setup_module, built, tmp_path):
    assert setup_module.generator(tmp_path, None) == ["-G", "Unix Makefiles"]
    setup_module.generator(built(), None)
    assert not (tmp_path / "CMakeCache.txt").exists()  # which was ninja's


def test_modules_of_an_earlier_build_do_not_come_along(setup_module, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    stale = tmp_path / "build/package/renamed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    monkeypatch.chdir(tmp_path)
    command = setup_module.FreshBuildPy(Distribution({"packages": ["package"], "script_name": "setup.py"}))
    command.build_lib = "build"
    command.ensure_finalized()
    command.run()
    assert sorted(path.name for path in (tmp_path / "build").rglob("*.py")) == ["__init__.py"]


# ---- the source distribution ----


@pytest.fixture
def source_distribution(tmp_path):
    """The unpacked tarball, made where torch cannot be found."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("csrc", "haste_ext", "python/haste"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/support/absent_packages"), "ABSENT_PACKAGES": "torch"}
    result = subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as tarball:
        tarball.extractall(tmp_path)
    return next(tmp_path.glob("haste-*/"))


def test_a_source_distribution_holds_all_that_a_build_needs(source_distribution):
    """That a wheel is built from it and imports is tried by hand: it takes minutes."""

    def files(root: Path) -> set[str]:
        wanted = [path for name in ("csrc", "haste_ext", "python/haste") for path in (root / name).rglob("*")]
        kept = [path for path in wanted if path.is_file() and path.suffix not in (".pyc", ".so", ".md")]
        return {str(path.relative_to(root)) for path in kept}

    assert files(source_distribution) == files(ROOT)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        assert (source_distribution / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_wheel_holds_what_is_not_python_too(source_distribution):
    """The step of a wheel's build that gathers the files of the packages."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "gathered"]
    result = subprocess.run(command, cwd=source_distribution, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    gathered = {path.relative_to(source_distribution / "gathered/haste") for path in
                (source_distribution / "gathered/haste").rglob("*") if path.is_file()}  # fmt: skip
    package = ROOT / "python/haste"
    wanted = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert gathered == wanted and Path("report/templates/page.css") in gathered
