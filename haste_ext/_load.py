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
    from haste_ext import _C  # type: ignore[attr-defined]  # the compiled module
except ImportError as error:
    raise ImportError(
        f"haste_ext's compiled module does not load under torch {torch.__version__} ({error}): run "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder",
        name="haste_ext._C",
    ) from error


def check_environment() -> None:
    """ImportError for a build of an older source, or for HASTE_CPU_CAPABILITY or HASTE_CUDA_KERNELS that it lacks."""
    if not hasattr(_C, "cpu_capabilities"):
        raise ImportError(
            f"haste_ext's compiled module, {_C.__file__}, is of an older source than {HERE}: run `pip install "
            "--no-build-isolation --force-reinstall --no-deps .` in the source folder",
            name="haste_ext._C",
        )
    for variable, held in (("HASTE_CPU_CAPABILITY", _C.cpu_capabilities()), ("HASTE_CUDA_KERNELS", _C.cuda_kernels())):
        given = os.environ.get(variable)
        if given and held and given not in held:  # a build without CUDA has no use for CUDA kernels
            raise ImportError(f"{variable} must be one of {', '.join(held)}, got '{given}'", name="haste_ext._C")


check_environment()


def build_info() -> dict[str, object]:
    """What this build holds.

    Returns:
        ``version``; ``torch`` (built against) and ``torch_loaded``; ``compiler``; ``cuda`` (bool), ``cuda_compiler``,
        ``cuda_targets`` (e.g. ``["80", "90"]``) and ``cuda_kernels`` (``portable`` and, built for 9.0, ``hopper``,
        which a device of compute capability 9.0 takes by itself; ``HASTE_CUDA_KERNELS`` chooses one);
        ``cpu_capabilities`` (the instruction sets that can run here, narrowest first) and ``cpu_capability`` (the one
        in force; ``HASTE_CPU_CAPABILITY`` chooses another).
    """
    return {**_C.build_info(), "torch_loaded": torch.__version__}
