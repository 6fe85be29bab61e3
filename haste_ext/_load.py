"""Loads the compiled module, which registers ``torch.ops.haste.*``, or says in one sentence why it cannot."""

from __future__ import annotations

from pathlib import Path

import torch  # noqa: F401  (loads libtorch, whose symbols the compiled module uses)

try:
    from haste_ext import _C
except ImportError as error:
    here = Path(__file__).resolve().parent
    if not list(here.glob("_C.*")):
        raise ImportError(
            f"haste_ext was imported from {here}, which holds no compiled module: run `pip install -e .` there, "
            "or leave the source folder to use the installed package."
        ) from None
    raise ImportError(
        f"haste_ext's compiled module does not load under torch {torch.__version__} ({error}): run "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder."
    ) from error


def build_info() -> dict[str, object]:
    """What this build holds.

    Returns a dict: ``version``; ``torch`` (built against) and ``torch_loaded``; ``compiler``; ``cuda`` (bool),
    ``cuda_compiler``, ``cuda_targets`` (e.g. ``["80", "90"]``) and ``cuda_paths`` (``portable`` and, built for 9.0,
    ``hopper``, which a device of compute capability 9.0 takes by itself; ``HASTE_CUDA_PATH`` chooses one);
    ``cpu_paths`` (the processor paths that can run here, narrowest first) and ``cpu_path`` (the one in force;
    ``HASTE_CPU_PATH`` chooses another).
    """
    return {**_C.build_info(), "torch_loaded": torch.__version__}
