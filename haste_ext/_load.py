"""Loads the compiled module, which registers ``torch.ops.haste.*``, or says in one sentence why it cannot."""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # noqa: F401  (loads libtorch, whose symbols the compiled module uses)

HERE = Path(__file__).resolve().parent


def holds_module(folder: Path) -> bool:
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def folder_of_module() -> Path:
    """Where the compiled module is: here, or, of a source folder in which nothing is built, in the installed package.

    In a source folder Python takes this package from there, for that comes first on its path.
    """
    folders = [HERE, *(Path(entry or ".").resolve() / "haste_ext" for entry in sys.path)]
    for folder in folders:
        if holds_module(folder):
            return folder
    raise ImportError(
        f"haste_ext in {HERE} holds no module that was compiled for this Python: run `pip install .` in the source "
        "folder",
        name="haste_ext._C",
    )


folder = folder_of_module()
if folder != HERE:
    sys.modules["haste_ext"].__path__.append(str(folder))
try:
    from haste_ext import _C
except ImportError as error:
    raise ImportError(
        f"haste_ext's compiled module does not load under torch {torch.__version__} ({error}): run "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder",
        name="haste_ext._C",
    ) from error


def check_paths() -> None:
    """ImportError for a path of HASTE_CPU_PATH or HASTE_CUDA_PATH that this build does not hold."""
    for variable, paths in (("HASTE_CPU_PATH", _C.cpu_paths()), ("HASTE_CUDA_PATH", _C.cuda_paths())):
        given = os.environ.get(variable)
        if given and paths and given not in paths:  # a build without CUDA has no use for a CUDA path
            raise ImportError(f"{variable} must be one of {', '.join(paths)}, got '{given}'", name="haste_ext._C")


check_paths()


def build_info() -> dict[str, object]:
    """What this build holds.

    Returns a dict: ``version``; ``torch`` (built against) and ``torch_loaded``; ``compiler``; ``cuda`` (bool),
    ``cuda_compiler``, ``cuda_targets`` (e.g. ``["80", "90"]``) and ``cuda_paths`` (``portable`` and, built for 9.0,
    ``hopper``, which a device of compute capability 9.0 takes by itself; ``HASTE_CUDA_PATH`` chooses one);
    ``cpu_paths`` (the processor paths that can run here, narrowest first) and ``cpu_path`` (the one in force;
    ``HASTE_CPU_PATH`` chooses another).
    """
    return {**_C.build_info(), "torch_loaded": torch.__version__}
