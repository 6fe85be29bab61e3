"""Builds haste_ext/_C with CMake, against the torch that is installed; all metadata is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without importing it.

    In an isolated build torch cannot be imported, yet the interpreter is the target's own: there its packages
    stand under `purelib`.
    """
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders.append(Path(sysconfig.get_paths()["purelib"]) / "torch")
    for folder in folders:
        version_file = folder / "version.py"
        if version_file.exists():
            version = re.search(r"__version__ = '([^']+)'", version_file.read_text()).group(1)
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
                sys.exit(
                    f"haste needs torch >= 2.11 and found {version}: run `pip install -U torch`, then install haste."
                )
            return folder, version
    sys.exit(
        "haste builds against the torch that is installed and found none: run `pip install torch`, then install haste."
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir, torch_version = find_torch()
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch_version}"
        build_dir.mkdir(parents=True, exist_ok=True)
        # cmake and ninja of this environment come first, also where its bin folder is not on PATH.
        env = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            *generator(build_dir, shutil.which("ninja", path=env["PATH"])),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DHASTE_TORCH_DIR={torch_dir}",
            f"-DHASTE_TORCH_VERSION={torch_version}",
            f"-DHASTE_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
        ]
        try:
            subprocess.run(configure, check=True, env=env)
            subprocess.run(["cmake", "--build", str(build_dir), "-j", str(parallel_jobs())], check=True, env=env)
        except FileNotFoundError:
            sys.exit("haste is built by cmake and found none: run `pip install 'cmake>=3.25'`, then install haste.")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"building haste_ext failed: `{' '.join(error.cmd)}` ended with status {error.returncode}, see above."
            )

    def copy_file(self, source, target, *args, **kwargs):
        """As setuptools does it for an editable install, but whole at once: processes that run keep the module they
        have loaded, and one that starts meanwhile finds the old file or the new one."""
        partial = f"{target}.{os.getpid()}"
        super().copy_file(source, partial, *args, **kwargs)
        os.replace(partial, target)
        return target, True


class FreshBuildPy(build_py):
    def run(self) -> None:
        """As setuptools does it, but without what an earlier build has left: modules that are no more would come
        along into the wheel."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def generator(build_dir: Path, ninja: str | None) -> list[str]:
    """CMake's arguments that choose ninja (None: it is not there, and make is taken).

    The build folder outlives the environment that pip builds in. Objects are kept, but the tools are named anew each
    time, and what CMake remembers is dropped where it is about another place or about programs that are gone.
    """
    name = "Ninja" if ninja else "Unix Makefiles"
    program = [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    known = cmake_cache(build_dir)
    gone = [
        entry
        for entry, (kind, value) in known.items()
        if kind == "FILEPATH"
        and os.path.isabs(value)
        and not os.path.exists(value)
        # Told each time.
        and entry not in ("CMAKE_MAKE_PROGRAM", "Python_EXECUTABLE")
    ]
    expected = {"CMAKE_HOME_DIRECTORY": str(ROOT), "CMAKE_CACHEFILE_DIR": str(build_dir), "CMAKE_GENERATOR": name}
    if known and (gone or any(known.get(entry, ("", ""))[1] != value for entry, value in expected.items())):
        shutil.rmtree(build_dir / "CMakeFiles", ignore_errors=True)
        (build_dir / "CMakeCache.txt").unlink()
    return ["-G", name, *program]


def cmake_cache(build_dir: Path) -> dict[str, tuple[str, str]]:
    """Type and value of each entry of CMakeCache.txt; empty where nothing was configured yet."""
    path = build_dir / "CMakeCache.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {name: (kind, value) for name, kind, value in re.findall(r"^([^#/\n][^:\n]*):(\w+)=(.*)$", text, re.M)}


def parallel_jobs() -> int:
    """MAX_JOBS, or as many as there are processors."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        sys.exit(f"MAX_JOBS must be a whole number of at least 1, got '{given}'")
    return int(given)


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        sys.exit("haste is bound by pybind11 and found none: run `pip install pybind11`, then install haste.")
    return pybind11.get_cmake_dir()


# What needs torch; making a source distribution does not, nor saying what a build requires.
BUILDS = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}

if __name__ == "__main__":
    # Said before anything is compiled: pip asks for the metadata first.
    if BUILDS & set(sys.argv):
        find_torch()
        parallel_jobs()
    setup(
        ext_modules=[Extension("haste_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
    )
